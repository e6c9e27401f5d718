"""After `quarto render`: take from the pages what asks an outside host for something, and mend what is wrong in all of them.

Quarto adds require.js and jQuery from an outside host to pages with HTML outputs, and a line that needs them; inline scripts of such
outputs run without. Pandoc writes the double bar of a norm as the relation "parallel to", which browsers set with spaces, and a hat
that they stretch over the letter. Outputs that are wider than the page scroll, which a keyboard must reach. Quarto starts this script
with the rendered files in QUARTO_PROJECT_OUTPUT_FILES, one a line.
"""
import os
import re
from pathlib import Path

OUTSIDE = re.compile(
    r'<script[^>]*src="https?://[^"]*(?:require|jquery)[^"]*"[^>]*>\s*</script>\s*'
    r"|<script[^>]*>\s*define\('jquery'[^<]*</script>\s*",      # for require.js, which is gone
    re.IGNORECASE,
)
WORDS = {
    ">∥</mo>": ">‖</mo>",
    '<mo accent="true">\u0302</mo>': '<mo accent="true" stretchy="false">^</mo>',
    "<pre><code>": '<pre tabindex="0"><code>',
}


def mend(html: str) -> str:
    "`html` without script tags that load require.js or jQuery from another host, or need them, and with those words replaced."
    for wrong, right in WORDS.items(): html = html.replace(wrong, right)
    return OUTSIDE.sub("", html)


if __name__ == "__main__":
    for name in os.environ.get("QUARTO_PROJECT_OUTPUT_FILES", "").splitlines():
        page = Path(name)
        if page.suffix == ".html":
            before = page.read_text(encoding="utf-8")
            after = mend(before)
            if after != before:
                page.write_text(after, encoding="utf-8")
