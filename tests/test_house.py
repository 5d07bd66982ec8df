"The house: imports point one way, importing stays cheap, metadata has one place."
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "medssl_nb"
MAY_IMPORT = {
    "data": set(), "views": set(), "nets": set(), "train": set(), "ssl": {"views", "nets"}, "tasks": {"nets"},
    "evaluate": {"tasks", "train", "nets", "data"}, "show": {"views", "data"}, "trust": {"tasks", "nets"},
}
SLOW = ("monai", "matplotlib", "ipywidgets", "nilearn", "sklearn", "accelerate")


def imports(path):
    "Every name of ours that a module imports, anywhere in it, as a folder of the package; and all other top modules."
    parts = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = ["medssl_nb", *parts[: len(parts) - node.level], *base]
            yield from ((node.lineno, [*base, alias.name]) for alias in node.names)


def test_imports_point_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        folder = path.relative_to(PACKAGE).parts[0]
        for line, name in imports(path):
            other = name[1] if name[0] == "medssl_nb" and len(name) > 1 else None
            if folder in MAY_IMPORT and other in MAY_IMPORT and other != folder and other not in MAY_IMPORT[folder]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {folder} imports {other}")
    assert not wrong


def test_the_direction_check_sees_a_wrong_import(tmp_path, monkeypatch):
    bad = tmp_path / "data" / "x.py"
    bad.parent.mkdir()
    bad.write_text("def f():\n    from ..ssl.base import create\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert list(imports(bad)) == [(2, ["medssl_nb", "ssl", "base", "create"])]


def loaded_by(statement):
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())


@pytest.mark.parametrize("statement", ["import medssl_nb", "import medssl_nb.ssl", "import medssl_nb.nets", "import medssl_nb.views", "import medssl_nb.data", "import medssl_nb.train"])
def test_importing_is_cheap(statement):
    assert not loaded_by(statement) & set(SLOW)


def test_ssl_loads_little_beside_torch():
    beside = {m for m in loaded_by("import medssl_nb.ssl") - loaded_by("import torch") if not m.startswith("_")}
    assert beside <= {"medssl_nb", "difflib", "pkgutil", "colorsys"}, beside


def test_every_public_function_says_what_it_does():
    silent = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not silent


def test_settings_are_the_one_place_for_metadata():
    assert "version =" not in (ROOT / "pyproject.toml").read_text().split("[tool")[0].replace("dynamic", "")
    version = re.search(r"^version = (\S+)", (ROOT / "settings.ini").read_text(), re.M)[1]
    assert f'"{version}"' in (PACKAGE / "__init__.py").read_text()


def test_no_pickle_is_read():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"torch\.load\(|pickle\.load|allow_pickle=True", text), path


def test_the_whole_book_has_a_place_on_the_site():
    listed = (ROOT / "_quarto.yml").read_text()
    missing = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if p.relative_to(ROOT).as_posix() not in listed and ".ipynb_checkpoints" not in str(p)]
    assert not missing


def test_every_chapter_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [chapter for path in sorted((ROOT / "nbs").glob("[1-9]_*/*.ipynb")) if (chapter := path.relative_to(ROOT).as_posix()) not in text]
