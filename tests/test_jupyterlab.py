"""A chapter in JupyterLab, in a window as large as a laptop's: it runs top to bottom, its widgets
move, nothing is too wide."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from browser import chromium
from test_explorables import NBS, needs_browser

pytestmark = pytest.mark.slow

WIDE = """() => [...document.querySelectorAll(".jp-OutputArea-output")]
  .filter((x) => x.scrollWidth > x.clientWidth + 1)
  .map((x) => x.textContent.trim().slice(0, 80))"""


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a copy of the notebooks, with all cells in the page and not only those in sight."
    shutil.copytree(NBS, tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    tracker = (
        tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    )
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "ROTVQ_STATIC")}
    env |= {
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
        "ROTVQ_DATA": "sample",
        "ROTVQ_PRESET": "smoke",
    }
    command = [
        Path(sys.executable).with_name("jupyter"),
        "lab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={tmp_path / 'nbs'}",
        "--LabApp.news_url=None",
    ]
    log = open(tmp_path / "log", "w+")
    server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(address + "api", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        else:
            raise TimeoutError((tmp_path / "log").read_text())
        yield address, tmp_path / "nbs"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def code_of(notebook: Path) -> list[dict]:
    return [
        cell
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]


@needs_browser
def test_a_chapter_runs_in_jupyterlab(lab):
    address, folder = lab
    name = "book/05_scaling.ipynb"
    with chromium(viewport={"width": 1366, "height": 768}) as page:
        page.set_default_timeout(180_000)
        failures = []
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(f"{address}lab/tree/{name}")
        page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
        page.get_by_text("| Idle").first.wait_for()  # the kernel, in the status bar
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        for _ in range(90):  # what is in sight does not tell: solutions are folded
            page.wait_for_timeout(2000)
            page.keyboard.press("Control+s")
            with contextlib.suppress(json.JSONDecodeError):  # half saved
                if all(cell["execution_count"] for cell in code_of(folder / name)):
                    break
        else:
            raise TimeoutError("not all cells have run")
        slider = page.locator(
            ".widget-slider [role=slider]"
        ).first  # under the first figure to play with
        picture = page.locator(".jp-OutputArea-output:has(.widget-slider) img").first
        before = picture.get_attribute("src")
        slider.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "(before) => document.querySelector('.jp-OutputArea-output:has(.widget-slider)"
            " img')?.src !== before",
            arg=before,
        )
        assert not page.evaluate(WIDE)
        assert not failures
    code = code_of(folder / name)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [
        output
        for cell in code
        for output in cell["outputs"]
        if output["output_type"] == "error" or output.get("name") == "stderr"
    ]
