"""After `quarto render`: take from the pages what asks an outside host for something, and mend what is wrong in all of them.

Quarto adds require.js and jQuery from an outside host to pages with HTML outputs, and a line that needs them; inline scripts of such
outputs run without. Pandoc writes the double bar of a norm as the relation "parallel to", which browsers set with spaces, and a hat
that they stretch over the letter. Outputs that are wider than the page scroll, which a keyboard must reach. nbdev links names of the
package to the published site, where they stood in chapters; here they lead to the reference, beside the page. Quarto starts this script
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
ROOT = Path(__file__).resolve().parent.parent
# what nbdev knows of each name: page and anchor, and the file that holds it
PLACES = dict(re.findall(r"\('([\w.]+#[\w.]+)',\s+'rotvq/(\w+)\.py'\)", (ROOT / "rotvq" / "_modidx.py").read_text(encoding="utf-8")))


def to_reference(link: re.Match) -> str:
    place = link[1]
    return f'href="reference/{PLACES[place]}.html#{place.partition("#")[2]}"' if place in PLACES else link[0]


def wrapped(output: re.Match) -> str:
    "Sentences that are wider than the page are wrapped; what is set in columns scrolls."
    lines = output[2].splitlines()
    sentences = any(len(line) > 88 for line in lines) and not any("   " in line.strip() for line in lines)
    return output[1].replace("<pre", '<pre class="sentences"') + output[2] if sentences else output[0]


def mend(html: str) -> str:
    "`html` without script tags that load require.js or jQuery from another host, or need them; those words and links replaced."
    for wrong, right in WORDS.items(): html = html.replace(wrong, right)
    html = re.sub(r'(<pre tabindex="0"><code>)([^<]*)', wrapped, html)
    html = re.sub(r'href="https://[^"/]+/rotvq/([\w.]+#[\w.]+)"', to_reference, html)
    # a still picture inside the page is no address that a preview could show
    html = re.sub(r'(<meta property="og:image" content="https://[^"/]+/[^"/]+/)data:[^"]*"', r'\1images/effect.png"', html)
    return OUTSIDE.sub("", html)


if __name__ == "__main__":
    for name in os.environ.get("QUARTO_PROJECT_OUTPUT_FILES", "").splitlines():
        page = Path(name)
        if page.suffix == ".html":
            before = page.read_text(encoding="utf-8")
            after = mend(before)
            if after != before:
                page.write_text(after, encoding="utf-8")
