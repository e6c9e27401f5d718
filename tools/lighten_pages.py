"""After `quarto render`: what is seen first does not wait for what is not.

Scripts of the head run once the page is parsed. The sheet of the other theme is fetched where it is
asked for. Of the two thousand icons the pages use a dozen, and of Bootstrap's rules a sixth: font
and sheets keep those whose names occur in a page or a script. The still pictures of moving figures
become files, which wait until they are near. Quarto starts this script with the folder of the site
in QUARTO_PROJECT_OUTPUT_DIR.
"""

import base64
import hashlib
import os
import re
from pathlib import Path

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

THEME = """<script>
// the dark sheet blocks the page for who wants it, and is not fetched for others
(() => {
  let stored = null;
  try { stored = localStorage.getItem("quarto-color-scheme"); } catch { /* none is kept */ }
  const asked = matchMedia("(prefers-color-scheme: dark)").matches;
  if (stored ? stored === "alternate" : asked)
    document.querySelectorAll(".quarto-color-alternate").forEach((x) => { x.rel = "stylesheet"; });
})();
</script>
"""


def sooner(html: str) -> str:
    "`html` whose first paint waits for the sheet of its own theme only."
    head, rest = html.split("</head>", 1) if "</head>" in html else ("", html)
    head = re.sub(r'<script (?=src=")(?![^>]*(?:defer|type="module"))', "<script defer ", head)
    other = r'(<link [^>]*)rel="stylesheet"([^>]*quarto-color-alternate[^>]*)>'
    if re.search(other, head):
        head = re.sub(other, r'\1rel="disabled-stylesheet" blocking="render"\2>', head) + THEME
    late = r'(<link href="[^"]*bootstrap-icons\.css" rel="stylesheet")>'
    head = re.sub(late, r"""\1 media="print" onload="this.media='all'">""", head)
    rest = rest.replace("<script>var lightboxQuarto", '<script type="module">var lightboxQuarto')
    return f"{head}</head>{rest}" if head else rest


def stills(html: str, page: Path, site: Path) -> str:
    "`html` with the pictures that it holds as files of `site`."
    folder = site / "assets" / "stills"

    def kept(found: re.Match) -> str:
        picture = base64.b64decode(found[1])
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{hashlib.sha256(picture).hexdigest()[:16]}.png"
        file.write_bytes(picture)
        return f'src="{os.path.relpath(file, page.parent)}"'.replace(os.sep, "/")

    return re.sub(r'(?<=\s)src="data:image/png;base64,([^"]+)"', kept, html)


def words_of(site: Path) -> set[str]:
    "What may be the name of a class or an icon, in pages and scripts."
    files = [*site.rglob("*.html"), *site.rglob("*.js")]
    return {word for f in files for word in re.findall(r"[\w-]+", f.read_text(encoding="utf-8"))}


def rules_of(sheet: str) -> list[tuple[str, str]]:
    "Selectors and block of each rule at the top of a sheet without comments, `@media` as one."
    rules, depth, start = [], 0, 0
    for mark in re.finditer(r'"[^"]*"|\([^()]*\)|[{};]', sheet):  # not inside of strings and url(…)
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0 and mark[0] in "};":
            head, brace, block = sheet[start : mark.end()].partition("{")
            rules.append((head.strip(), brace + block))
            start = mark.end()
    return rules


def few_rules(sheet: str, words: set[str]) -> str:
    "The rules of `sheet` that may apply: classes, outside of brackets, are among `words`."

    def applies(selector: str) -> bool:
        outside = re.sub(r":[\w-]+\([^()]*(?:\([^()]*\)[^()]*)*\)", "", selector)
        return set(re.findall(r"\.(-?[A-Za-z_][\w-]*)", outside)) <= words

    kept = []
    for head, block in rules_of(re.sub(r"/\*(?!!).*?\*/", "", sheet, flags=re.DOTALL)):
        if head.startswith(("@media", "@supports")):
            if inner := few_rules(block[1:-1], words):
                kept.append(f"{head}{{{inner}}}")
        elif head.startswith("@") or not block:
            kept.append(head + block)
        elif selectors := [part for part in split(head) if applies(part)]:
            kept.append(",".join(selectors) + block)
    return "".join(kept)


def split(selectors: str) -> list[str]:
    "At the commas that are in no bracket."
    return re.findall(r"(?:[^,()]|\((?:[^()]|\([^()]*\))*\))+", selectors)


def few_icons(site: Path, words: set[str]) -> None:
    "Of the icons only those that a page or a script names."
    named = {word.removeprefix("bi-") for word in words if word.startswith("bi-")}
    for sheet in site.rglob("bootstrap-icons.css"):
        text = sheet.read_text(encoding="utf-8")
        icon = r'\.bi-([\w-]+)::before \{ content: "\\([0-9a-f]+)"; \}\n?'
        points = {name: int(code, 16) for name, code in re.findall(icon, text) if name in named}
        font = TTFont(sheet.with_name("bootstrap-icons.woff"))
        subsetter = Subsetter(Options())
        subsetter.populate(unicodes=points.values())
        subsetter.subset(font)
        font.flavor = "woff"
        font.save(sheet.with_name("bootstrap-icons.woff"))
        text = re.sub(icon, lambda found: found[0] if found[1] in named else "", text)
        sheet.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if "QUARTO_PROJECT_OUTPUT_DIR" in os.environ:
        site = Path(os.environ["QUARTO_PROJECT_OUTPUT_DIR"]).resolve()
        for page in site.rglob("*.html"):
            before = page.read_text(encoding="utf-8")
            if "bootstrap-icons.css" in before and "blocking=" not in before:
                page.write_text(stills(sooner(before), page, site), encoding="utf-8")
        words = words_of(site)
        few_icons(site, words)
        for file in site.rglob("bootstrap-*.min.css"):
            file.write_text(few_rules(file.read_text(encoding="utf-8"), words), encoding="utf-8")
