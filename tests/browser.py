"""Chromium through playwright, for the tests that need more of a browser than one page and one
answer."""

import contextlib
import http.server
import threading
from pathlib import Path

from test_explorables import BROWSER


@contextlib.contextmanager
def chromium(**context):
    "A page of a fresh window; `context` as in playwright's `new_context`."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        try:
            yield browser.new_context(**context).new_page()
        finally:
            browser.close()


@contextlib.contextmanager
def served(folder: Path, prefix: str = "/"):
    "The address under which `folder` is served on this machine."

    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            return super().translate_path(
                "/" + path.removeprefix(prefix) if path.startswith(prefix) else "/nowhere"
            )

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}{prefix}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
