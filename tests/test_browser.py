"A real browser: the quickstart in JupyterLab, and the built docs site."
import functools
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync --disable-dev-shm-usage").split()
PATIENT = 240_000  # ms: conditions are waited for, so a fast machine never waits this long
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
NOTEBOOK = ROOT / os.environ.get("MEDSSL_NB_BROWSER_NOTEBOOK", "nbs/1_start/01_quickstart.ipynb")


@pytest.fixture
def page():
    "A page of headless Chromium that remembers what went wrong on it."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1100})
        page.set_default_timeout(PATIENT)
        page.problems = []
        page.on("requestfailed", lambda r: page.problems.append(f"request failed: {r.url[:200]}"))
        page.on("response", lambda r: page.problems.append(f"{r.status}: {r.url[:200]}") if r.status >= 400 else None)
        page.on("console", lambda m: page.problems.append(f"console: {m.text[:300]} {m.location}") if m.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(f"script: {str(error)[:300]}"))
        yield page
        browser.close()


# ---------------------------------------------------------------- JupyterLab

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab of its own, in quick mode, on a copy of one notebook: the address of that notebook."
    book, port = tmp_path / "book", free_port()
    book.mkdir()
    shutil.copy(NOTEBOOK, book)
    overrides = tmp_path / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    overrides.parent.mkdir(parents=True)
    overrides.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    env = {**os.environ, "MEDSSL_NB_QUICK": "1", "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    env |= {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    env["JUPYTERLAB_WORKSPACES_DIR"] = str(tmp_path / "workspaces")
    log = (tmp_path / "lab.log").open("w+")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
         "--IdentityProvider.token=book", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={book}"],
        cwd=book, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token=book", server, log)
        yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK.name}?token=book"
    finally:
        stop(server, f"http://127.0.0.1:{port}")
        log.close()


def wait_for(url, server, log):
    "Until the server answers; its log, where it does not."
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            return urllib.request.urlopen(url, timeout=5).read()
        except OSError:
            time.sleep(0.2)
    log.seek(0)
    raise RuntimeError("JupyterLab did not start:\n" + log.read()[-3000:])


def stop(server, address):
    "Asks the server to end, with its kernels; ends it where it does not."
    if server.poll() is None:
        try:
            urllib.request.urlopen(urllib.request.Request(f"{address}/api/shutdown?token=book", method="POST"), timeout=10)
        except OSError:
            server.terminate()
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


RUN_ALL = """async () => {
  const until = async test => { for (let i = 0; i < 2400; i++) { if (await test()) return; await new Promise(r => setTimeout(r, 100)) }
                                throw new Error('waited in vain for ' + test) }
  await until(() => window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.context)
  const app = window.jupyterapp, panel = app.shell.currentWidget, session = panel.sessionContext
  await panel.context.ready
  await until(() => session.isReady && session.session && session.session.kernel && session.session.kernel.connectionStatus == 'connected')
  await session.session.kernel.info
  await app.commands.execute('notebook:run-all-cells')
}"""
OUTPUTS = """async () => {
  const panel = window.jupyterapp.shell.currentWidget, kernel = panel.sessionContext.session.kernel
  for (let i = 0; i < 3; i++) await kernel.requestKernelInfo()
  return panel.content.model.toJSON().cells.filter(c => c.cell_type == 'code').map(c => ({
    source: [].concat(c.source).join('').slice(0, 300), count: c.execution_count, outputs: c.outputs.map(o => ({
      type: o.output_type, name: o.name || o.ename, kinds: Object.keys(o.data || {}),
      text: [].concat(o.text || (o.data || {})['application/vnd.jupyter.stderr'] || o.traceback || '').join('').slice(0, 2000)}))}))
}"""


def complaints(cells):
    "What a learner must not see: errors, warnings, and what a widget's callback left behind."
    bad = [(cell["source"], out) for cell in cells for out in cell["outputs"]
           if out["type"] == "error" or "application/vnd.jupyter.stderr" in out["kinds"]
           or (out["type"] == "stream" and out["name"] == "stderr" and re.search(r"Traceback|Warning|Error", out["text"]))]
    return "\n\n".join(f"{source}\n-> {out['name']}: {out['text']}" for source, out in bad)


@pytest.mark.skipif(not NOTEBOOK.exists(), reason=f"{NOTEBOOK.name} is not in this checkout")
def test_jupyterlab_runs_the_quickstart_and_its_slider_moves_the_picture(page, lab):
    page.goto(lab)
    page.evaluate(RUN_ALL)
    cells = page.evaluate(OUTPUTS)
    assert not complaints(cells), complaints(cells)
    assert all(cell["count"] for cell in cells if cell["source"].strip()), "a cell was not run"
    both = [o for cell in cells for o in cell["outputs"] if "application/vnd.jupyter.widget-view+json" in o["kinds"]]
    assert any("text/html" in o["kinds"] for o in both), "no widget with a static twin"
    widget = page.locator(".widget-vbox", has=page.locator("img.widget-image, .widget-image")).first
    widget.wait_for()
    assert page.locator(".medssl-strip").count() == 0, "JupyterLab shows the static strip instead of the widget"
    handle = widget.locator(".widget-slider", has=page.get_by_text("slice", exact=True)).locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    picture = widget.locator("img").first
    assert picture.evaluate("i => i.decode().then(() => i.naturalWidth)") > 100
    seen = [picture.get_attribute("src")]
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Home"):
        handle.focus()
        handle.press(key)
        page.wait_for_function("([image, before]) => image.src != before", arg=[picture.element_handle(), seen[-1]])
        seen.append(picture.get_attribute("src"))
    assert widget.locator(".widget-readout", has_text=re.compile("^0$")).count(), "Home did not lead to slice 0"
    assert not complaints(page.evaluate(OUTPUTS)), complaints(page.evaluate(OUTPUTS))


# ---------------------------------------------------------------- the docs site

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The address of the built site, served from a temporary folder."
    folder = tmp_path_factory.mktemp("site")
    for name in ("nbs", ".ci", "_quarto.yml"):
        source = ROOT / name
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(".*checkpoints", "__pycache__")) if source.is_dir() else shutil.copy(source, folder)
    done = subprocess.run([Path(sys.executable).with_name("smalldocs"), "render", "."], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    handler = functools.partial(Quiet, directory=str(folder / "_site"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder / "_site", f"http://127.0.0.1:{server.server_port}", done.stdout + done.stderr
    server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_every_page_loads_offline_with_its_figures_and_mathematics(site, page):
    folder, address, _ = site
    pages = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.html") if "site_libs" not in p.parts)
    pages.remove("index.html")  # only leads on to nbs/index.html
    assert len(pages) >= 10
    figures = formulas = 0
    for name in pages:
        page.goto(f"{address}/{name}")
        broken = page.evaluate("""async () => {
          const wait = i => i.decode().catch(() => 0)
          await Promise.all([...document.images].map(wait))
          return [...document.images].filter(i => !i.naturalWidth).map(i => i.outerHTML.slice(0, 200))}""")
        assert not broken, (name, broken)
        figures += page.evaluate("[...document.images].filter(i => i.naturalWidth > 100).length")
        formulas += page.locator("math").count()
        flat = page.evaluate("[...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().height < 4).length")
        assert not flat, f"{name}: {flat} formulas take no room"
        assert not page.locator("span.math").count(), f"{name}: a formula was left as LaTeX"
    assert figures > 10 and formulas > 3
    assert not page.problems, page.problems


def test_the_static_slider_moves_by_keyboard_and_two_on_a_page_do_not_clash(site, page):
    folder, address, _ = site
    page.goto(f"{address}/nbs/1_start/09_browse.html")
    page.locator(".medssl-strip").first.wait_for()
    page.evaluate("""() => { const one = document.querySelector('.medssl-strip'); one.after(one.cloneNode(true)) }""")
    strips = page.locator(".medssl-strip")
    first, second = strips.nth(0), strips.nth(1)
    sources = lambda: [s.locator("img").get_attribute("src") for s in (first, second)]  # noqa: E731
    start = sources()
    slider = first.locator("input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    moved = sources()
    assert moved[0] != start[0] and moved[1] == start[1]
    assert first.locator("img").evaluate("i => i.decode().then(() => i.naturalWidth)") > 100
    told = first.locator("output").inner_text()
    slider.press("ArrowLeft")
    assert sources() == start and first.locator("output").inner_text() != told  # back at the first picture
    slider.press("End")
    assert sources()[0] not in (start[0], moved[0])
    slider.click(position={"x": 3, "y": slider.bounding_box()["height"] / 2})  # and by mouse, to its left end
    assert slider.input_value() == "0" and sources()[0] not in (start[0], moved[0])
    assert not page.problems, page.problems


def test_search_finds_a_chapter(site, page):
    _, address, _ = site
    entries = json.loads(urllib.request.urlopen(f"{address}/search.json").read())
    assert any("browse" in entry["href"] for entry in entries)
    page.goto(f"{address}/")
    page.wait_for_url("**/nbs/index.html")  # the root leads to the book's first page
    assert page.locator("nav").count() and page.locator("h1").first.inner_text().strip()
