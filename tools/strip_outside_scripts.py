"""After `quarto render`: drop the require.js and jQuery tags, and the line that needs them, that Quarto adds from an outside host to pages with HTML outputs.

Inline scripts of such outputs run without them, and a page then asks no outside host for anything.
Quarto starts this script with the rendered files in QUARTO_PROJECT_OUTPUT_FILES, one a line.
"""
import os
import re
from pathlib import Path

OUTSIDE = re.compile(
    r'<script[^>]*src="https?://[^"]*(?:require|jquery)[^"]*"[^>]*>\s*</script>\s*'
    r"|<script[^>]*>\s*define\('jquery'[^<]*</script>\s*",      # for require.js, which is gone
    re.IGNORECASE,
)


def strip(html: str) -> str:
    "`html` without script tags that load require.js or jQuery from another host, or need them."
    return OUTSIDE.sub("", html)


if __name__ == "__main__":
    for name in os.environ.get("QUARTO_PROJECT_OUTPUT_FILES", "").splitlines():
        page = Path(name)
        if page.suffix == ".html":
            before = page.read_text(encoding="utf-8")
            after = strip(before)
            if after != before:
                page.write_text(after, encoding="utf-8")
