"Every notebook of the book runs in quick mode, and its saved outputs belong to its code."
import importlib.util
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("nb", ROOT / ".ci" / "nb.py")
nb = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nb)
BOOK = nb.notebooks()


@pytest.mark.parametrize("path", BOOK, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_runs_quickly(path, monkeypatch):
    monkeypatch.setenv("MEDSSL_NB_QUICK", "1")
    nb.execute(path)


def test_outputs_are_those_of_the_code():
    assert not list(nb.stale())


def test_every_module_has_a_notebook():
    assert not list(nb.orphans())


def test_saved_outputs_hold_no_errors():
    for path in BOOK:
        for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
            for out in cell.get("outputs", []):
                assert out.output_type != "error", f"{path}, cell {i}"
                assert out.get("name") != "stderr", f"{path}, cell {i}: {out.get('text', '')[:200]}"


def test_exceptions_in_callbacks_are_found(tmp_path):
    "The runner sees what a failing cell would not show."
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import ipywidgets as w\ns = w.IntSlider()\ndef f(change): 1 / 0\ns.observe(f, 'value')\ns.value = 3")])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, tmp_path / "broken.ipynb")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        nb.execute(tmp_path / "broken.ipynb")
