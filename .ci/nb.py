#!/usr/bin/env python3
"""The book's tool: runs notebooks, checks that nothing is stale, and makes README.md.

  python .ci/nb.py run [NOTEBOOK ...]   export, execute, save the outputs in place, clean
  python .ci/nb.py check                exported code, cleaned notebooks, README and outputs belong together
  python .ci/nb.py readme               README.md from nbs/index.ipynb
"""
import argparse
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from queue import Empty

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE, README = ROOT / "nbs", ROOT / "medssl_nb", ROOT / "README.md"


def notebooks():
    "Every notebook of the book, in reading order."
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))


def quick():
    return bool(os.environ.get("MEDSSL_NB_QUICK"))


def code_hash(nb):
    "A fingerprint of the code whose outputs are saved: cell by cell, comments included."
    code = "\n\0".join(c.source for c in nb.cells if c.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def callback_errors(nb):
    "Exceptions inside widget callbacks: they do not fail a cell, they only leave a trace in its outputs."
    for i, cell in enumerate(nb.cells):
        for out in cell.get("outputs", []):
            text = out.get("data", {}).get("application/vnd.jupyter.stderr", "")
            if out.get("output_type") == "stream" and out.get("name") == "stderr":
                text += out.get("text", "")
            if "Traceback (most recent call last)" in text:
                yield i, cell.source, text


class PatientClient(NotebookClient):
    "Asks for a cell's reply again every second: one that comes while a widget is being written to is not announced."

    async def async_start_new_kernel_client(self):
        client = await super().async_start_new_kernel_client()
        ask = client.shell_channel.get_msg

        async def get_msg(timeout=None):
            left = float("inf") if timeout is None else timeout
            while True:
                try:
                    return await ask(timeout=min(1, left))
                except Empty:
                    if (left := left - 1) <= 0:
                        raise

        client.shell_channel.get_msg = get_msg
        return client


def execute(path):
    "Runs one notebook in its own folder's kernel; raises RuntimeError with notebook, cell source and traceback."
    nb = nbformat.read(path, as_version=4)
    client = PatientClient(
        nb, timeout=600, kernel_name="python3", record_timing=False,
        extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(path.parent)}},
    )
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    try:
        client.execute()
    except CellExecutionError as error:
        raise RuntimeError(f"{name} failed:\n{error}") from None
    for i, source, text in callback_errors(nb):
        raise RuntimeError(f"{name}, cell {i}: a widget's callback failed:\n{source}\n\n{text}")
    return nb


def last_picture(state, model_id):
    "The picture that a widget, or a widget inside it, shows last: what `interact` drew."
    model = state.get(model_id, {}).get("state", {})
    for out in reversed(model.get("outputs", [])):
        if "image/png" in out.get("data", {}):
            return out["data"]["image/png"]
    children = [c.removeprefix("IPY_MODEL_") for c in model.get("children", [])]
    return next((png for c in reversed(children) if (png := last_picture(state, c))), None)


def without_widget_state(nb):
    "Widgets keep their picture or static HTML; their state, full of random ids, is dropped."
    states = nb.metadata.pop("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for cell in nb.cells:
        kept = []
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if view := data.pop("application/vnd.jupyter.widget-view+json", None):
                if not {"text/html", "image/png"} & set(data):
                    if not (picture := last_picture(states, view["model_id"])):
                        continue  # a progress bar
                    data["image/png"] = picture
                data["text/plain"] = "interactive: run this cell in JupyterLab"
            kept.append(out)
        if "outputs" in cell:
            cell["outputs"] = kept
    return nb


def stream_tidy(nb):
    "Joins the pieces of one stream, and keeps only the last state of a progress line."
    for cell in nb.cells:
        merged = []
        for out in cell.get("outputs", []):
            if out.get("output_type") == "stream":
                out["text"] = re.sub(r"[^\n]*\r(?!\n)", "", out["text"])
                if merged and merged[-1].get("output_type") == "stream" and merged[-1]["name"] == out["name"]:
                    merged[-1]["text"] += out["text"]
                    continue
            merged.append(out)
        if "outputs" in cell:
            cell["outputs"] = merged
    return nb


def nbdev(command, *args):
    subprocess.run([Path(sys.executable).with_name(f"nbdev_{command}"), *args], cwd=ROOT, check=True)


def run(paths):
    if quick():
        sys.exit("MEDSSL_NB_QUICK is set: quick outputs are not saved. Unset it and run again.")
    for path in [Path(p).resolve() for p in paths] or notebooks():
        nbdev("export", "--path", str(path))
        nb = stream_tidy(without_widget_state(execute(path)))
        nb.metadata["medssl_nb"] = {"code": code_hash(nb)}
        nbformat.write(nb, path)
        nbdev("clean", "--fname", str(path))
        print(f"ran {path.relative_to(ROOT)}", flush=True)


def readme():
    "README.md: the index notebook as Markdown, its relative links prefixed with nbs/, its pictures kept beside it."
    from nbconvert import MarkdownExporter

    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if "remove-cell" not in c.metadata.get("tags", [])]
    exporter = MarkdownExporter(exclude_input=True)
    text, resources = exporter.from_notebook_node(nb)
    for name, content in sorted(resources.get("outputs", {}).items()):
        raise SystemExit(f"index.ipynb shows a picture as an output ({name}): save it under nbs/images and link it instead")
    text = re.sub(r"(\]\()(?!https?://|#|mailto:|/)([^)]+\))", r"\1nbs/\2", text)
    text = re.sub(r'(src=")(?!https?://|data:)', r"\1nbs/", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    README.write_text(text, encoding="utf-8")


def tree():
    "Every file that export, clean and readme may write, with its bytes."
    files = [README, *notebooks(), *PACKAGE.rglob("*.py")]
    return {p: p.read_bytes() for p in files if p.exists()}


def orphans():
    "Modules of the package that no notebook exports: what a renamed default_exp leaves behind."
    exported = {"_modidx.py", "__init__.py"}
    for path in notebooks():
        for cell in nbformat.read(path, as_version=4).cells:
            if match := re.search(r"^#\|\s*default_exp\s+(\S+)", cell.source, re.M):
                exported.add(match[1].replace(".", "/") + ".py")
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in exported and not (path.name == "__init__.py" and not path.read_text().strip()):
            yield f"{path.relative_to(ROOT)}: no notebook exports it"


def stale():
    "Notebooks whose saved outputs are older than their code."
    for path in notebooks():
        nb = nbformat.read(path, as_version=4)
        if nb.metadata.get("medssl_nb", {}).get("code") != code_hash(nb):
            yield f"{path.relative_to(ROOT)}: its code changed since it was run; python .ci/nb.py run {path.relative_to(ROOT)}"


def check():
    before = tree()
    nbdev("export"), nbdev("clean"), readme()
    after = tree()
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    problems = [f"{p.relative_to(ROOT)}: changed by export, clean or readme; commit the result" for p in changed]
    problems += [*orphans(), *stale()]
    print("\n".join(problems) or f"{len(notebooks())} notebooks and {len(after)} files belong together")
    sys.exit(bool(problems))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "check", "readme"])
    parser.add_argument("notebooks", nargs="*")
    args = parser.parse_args()
    run(args.notebooks) if args.command == "run" else {"check": check, "readme": readme}[args.command]()
