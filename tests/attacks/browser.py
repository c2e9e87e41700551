"""A person at JupyterLab: all cells run, the bar moves, the report's picture is there, an interrupt stops a run.

    python -m tests.attacks.browser --pictures /tmp/pictures

Drives Chromium, in a light and in a dark theme, and leaves screenshots to be looked at. Needs ``pip install jupyterlab
playwright`` and a Chromium (``--chromium``); exit is 1 where a step does not come true.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

import llmframe
from tests.server import SimulatedServer

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_MS = 180_000
SCREEN = {"width": 1200, "height": 1500}
RUN = """frame = pd.DataFrame({"text": [f"row {number}" for number in range(400)]})
out = frame.llm.complete("{text}", model="m", base_url=URL, api_key="none", checkpoint="runs/stop", max_concurrency=4)
print("rows", (out.response_status == "ok").sum())"""


@contextlib.contextmanager
def lab(place: Path) -> Iterator[str]:
    """Serve JupyterLab in a directory, and give its address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    token = secrets.token_hex(8)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={place}"]
    home = {name: str(place / ".jupyter") for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR")}
    # All of a notebook is in the page: by itself, JupyterLab keeps only what is on the screen.
    settings = place / ".jupyter" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')
    with open(place / "lab.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | home)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}").close()
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?reset&token={token}"  # no tabs of before
    finally:
        process.terminate()
        process.wait(30)


def empty(path: Path, cells: list[str] | None = None) -> None:
    """Write a notebook without outputs: what is seen afterwards was made in the browser."""
    if cells is None:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
    else:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


def run_all(page: Any) -> None:
    """Choose Run All Cells."""
    page.locator(".jp-Notebook").first.wait_for(timeout=PATIENCE_MS)
    page.get_by_text("Python 3 (ipykernel) | Idle").first.wait_for(timeout=PATIENCE_MS)  # what is run before is lost
    empty = page.locator(".jp-CodeCell .jp-InputPrompt").get_by_text("[ ]:")
    while True:
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(2000)
        if not empty.count():
            return


def quickstart(page: Any, address: str, pictures: Path) -> None:
    """Run notebook 01: its bar moves, and the report has its picture."""
    page.goto(address.format("notebooks/01-quickstart.ipynb"))
    run_all(page)
    seen: set[str] = set()
    report = page.locator(".llmframe-run svg").first
    until = time.monotonic() + PATIENCE_MS / 1000
    while not report.is_visible():
        bars = page.locator(".jp-OutputArea-output:has-text('/40')").all_inner_texts()
        seen |= {text for text in bars if "left" in text or "in flight" in text}
        if time.monotonic() > until:
            raise AssertionError("the report's picture did not come")
        page.wait_for_timeout(200)
    assert len(seen) >= 3, f"the bar did not move: {seen}"
    page.locator(".jp-OutputArea-output:has-text(\"did you mean 'review'\")").wait_for(timeout=PATIENCE_MS)
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
    page.locator(".jp-CodeCell:has-text('labelled = ')").first.screenshot(path=pictures / "quickstart.png")
    page.locator(".llmframe-run").first.scroll_into_view_if_needed()
    page.screenshot(path=pictures / "report-light.png")
    page.locator(".llmframe-run").first.screenshot(path=pictures / "report-alone.png")
    box = page.locator(".llmframe-review input")
    box.scroll_into_view_if_needed()
    rows = page.locator(".llmframe-review tbody tr")
    before = sum(row.is_visible() for row in rows.all())
    box.fill("love this phone")
    after = sum(row.is_visible() for row in rows.all())
    assert 0 < after < before, f"the search left {after} of {before} rows"
    page.screenshot(path=pictures / "review-light.png")
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.locator(".lm-Menu-itemLabel:text-is('Theme')").hover()
    page.get_by_role("menuitem", name="JupyterLab Dark", exact=True).click()
    page.locator("body[data-jp-theme-light=false]").wait_for(state="attached", timeout=PATIENCE_MS)
    page.locator(".llmframe-run").first.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    page.screenshot(path=pictures / "report-dark.png")
    page.keyboard.press("Control+s")


def interrupted(page: Any, address: str, server: SimulatedServer) -> None:
    """Press the interrupt button in a run, and run the cell again."""
    page.goto(address.format("stop.ipynb"))
    run_all(page)
    server.wait_for(answered=8)
    page.locator("[data-command='notebook:interrupt-kernel'], [title^='Interrupt the kernel']").first.click()
    page.locator(".jp-OutputArea-output:has-text('Interrupted')").first.wait_for(timeout=20_000)
    server.change(latency_s=0.0)
    run_all(page)
    page.locator(".jp-OutputArea-output:has-text('rows 400')").wait_for(timeout=60_000)
    assert max(server.answered_by_content().values()) == 1, "an answer was paid for twice"


def report_file(browser: Any, server: SimulatedServer, place: Path, pictures: Path) -> None:
    """Open the file of `to_html`: its picture is there, light and dark, and it asks for nothing from elsewhere."""
    server.reset(latency_s=0.05, slots=16)
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(600)] + ["[[status=400]]"]})
    frame.llm.complete("{text}", model="m", base_url=server.base_url, api_key="none", progress=False)
    llmframe.last_run().to_html(place / "run.html")
    for theme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 1200, "height": 700}, color_scheme=theme)
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto((place / "run.html").as_uri())
        assert page.locator("svg").first.is_visible()
        page.screenshot(path=pictures / f"file-{theme}.png")
        assert all(url.startswith("file:") for url in asked), asked
        page.close()


def main() -> int:
    """Go through it once."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.browser", description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=Path, default=Path("pictures"), help="a directory for the screenshots")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    chosen = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        parser.error("it needs: pip install jupyterlab playwright")
    if chosen.chromium is None:
        parser.error("no chromium found; name one with --chromium")
    chosen.pictures.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("data", "notebooks"):
            shutil.copytree(ROOT / name, place / name)
        empty(place / "notebooks" / "01-quickstart.ipynb")
        server = stack.enter_context(SimulatedServer(latency_s=0.4))
        empty(place / "stop.ipynb", [f"import pandas as pd, llmframe\nURL = {server.base_url!r}", RUN])
        address = stack.enter_context(lab(place))
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=chosen.chromium, args=["--no-sandbox"])
        stack.callback(browser.close)
        page = browser.new_page(viewport=SCREEN)
        for name, step in (
            ("the file of a report", lambda: report_file(browser, server, place, chosen.pictures)),
            ("interrupt", lambda: (server.reset(latency_s=0.4), interrupted(page, address, server))),
            ("quickstart", lambda: quickstart(page, address, chosen.pictures)),
        ):
            began = time.monotonic()
            try:
                step()
            except Exception:
                page.screenshot(path=chosen.pictures / "failed.png")
                raise
            print(f"{name}: holds, {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
