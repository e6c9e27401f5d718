"""After `quarto render`: take from the pages what asks an outside host for something, and mend what
is wrong in all of them; and pictures wait until they are near.

Quarto adds require.js and jQuery from an outside host to pages with HTML outputs, and a line that
needs them; inline scripts of such outputs run without. Pandoc writes the double bar of a norm as
the relation "parallel to", which browsers set with spaces, and a hat that they stretch over the
letter. Outputs that are wider than the page scroll, which a keyboard must reach. nbdev links names
of the package to the published site, where they stood in chapters; here they lead to the reference,
beside the page. A link to a work of references.bib, which in JupyterLab is just that, becomes a
citation: Quarto's script shows the entry over it, and the page lists it at its end. Pages of
notebooks offer the notebook, here and in Colab. Quarto starts this script with the rendered files
in QUARTO_PROJECT_OUTPUT_FILES, one a line.
"""

import os
import re
import shutil
from configparser import ConfigParser
from html import unescape
from pathlib import Path

OUTSIDE = re.compile(
    r'<script[^>]*src="https?://[^"]*(?:require|jquery)[^"]*"[^>]*>\s*</script>\s*'
    r"|<script[^>]*>\s*define\('jquery'[^<]*</script>\s*",  # for require.js, which is gone
    re.IGNORECASE,
)
# a still picture inside the page is no address that a preview could show, and the one of the site
# lies in no folder of a chapter
PREVIEW = re.compile(
    r'(?<=<meta property="og:image" content=")(https://[^"/]+/[^"/]+/)'
    r'(?:data:[^"]*|(?:\w+/)+images/[^"]*)(?=")'
)
WORDS = {
    ">∥</mo>": ">‖</mo>",
    '<mo accent="true">\u0302</mo>': '<mo accent="true" stretchy="false">^</mo>',
    "<pre><code>": '<pre tabindex="0"><code>',
}
ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
ROOT_OF_SITE = "\0"  # until it is known how far above a page it lies
config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
REPOSITORY = "github/{user}/{repo}/blob/{branch}".format(**config["DEFAULT"])
# what nbdev knows of each name: page and anchor, and the file that holds it
PLACES = dict(
    re.findall(
        r"\('([\w./]+#[\w.]+)',\s+'rotvq/([\w/]+)\.py'\)",
        (ROOT / "rotvq" / "_modidx.py").read_text(encoding="utf-8"),
    )
)


def to_reference(link: re.Match) -> str:
    place = link[1]
    return (
        f'href="{ROOT_OF_SITE}reference/{PLACES[place]}.html#{place.partition("#")[2]}"'
        if place in PLACES
        else link[0]
    )


def wrapped(output: re.Match) -> str:
    "Sentences that are wider than the page are wrapped; what is set in columns scrolls."
    lines = output[2].splitlines()
    sentences = any(len(line) > 88 for line in lines) and not any(
        "   " in line.strip() for line in lines
    )
    return (
        output[1].replace("<pre", '<pre class="sentences"') + output[2] if sentences else output[0]
    )


def mend(html: str, depth: int = 0) -> str:
    """`html` without script tags that load require.js or jQuery from another host, or need them;
    those words and links replaced. `depth`: the folders that its page lies in."""
    for wrong, right in WORDS.items():
        html = html.replace(wrong, right)
    html = re.sub(r'(<pre tabindex="0"><code>)([^<]*)', wrapped, html)
    html = re.sub(r'href="https://[^"/]+/rotvq/([\w./]+#[\w.]+)"', to_reference, html)
    html = html.replace(ROOT_OF_SITE, "../" * depth)
    # stored outputs know of no folder
    html = html.replace('src="assets/', f'src="{"../" * depth}assets/')
    html = PREVIEW.sub(r"\1images/effect.png", html)
    html = re.sub(r"<img (?![^>]*\bloading=)", '<img loading="lazy" ', html)
    folded = r'<div (?=class="callout-header[^>]*data-bs-toggle="collapse")'
    button = (
        """<div role="button" tabindex="0" onkeydown="if (event.key === 'Enter') this.click()" """
    )
    html = re.sub(folded, button, html)
    return OUTSIDE.sub("", html)


def sourced(html: str, source: str) -> str:
    """`html` of a page that shows figures of notebooks (`{{< embed … >}}` in its `source`), each
    with a link to the code that draws it."""
    for notebook, figure in re.findall(r"embed (\S+)\.ipynb#(fig-[\w-]+)", source):
        page = re.sub(r"(^|/)\d+_", r"\1", notebook)  # as nbdev names it
        link = f' <a href="{page}.html#{figure}">Code.</a>'
        html = re.sub(
            rf'(<figcaption[^>]* id="{figure}-caption.*?)\s*(</figcaption>)',
            lambda found: f"{found[1]}{link}{found[2]}",
            html,
            count=1,
            flags=re.DOTALL,
        )
    return html


def lead(html: str) -> str:
    """The page at an old address, which Quarto makes of `aliases`: it leads to the same place of
    the new page, and without JavaScript to its beginning."""
    new = re.search(r'var redirects = {"":"([^"]+)"', html)[1]
    html = html.replace("location.replace(redirect)", "location.replace(redirect + location.hash)")
    html = html.replace("<html ", '<html lang="en" ', 1)
    known = f'<meta http-equiv="refresh" content="1; url={new}"><link rel="canonical" href="{new}">'
    said = f'<p>This page has moved: <a href="{new}">here</a> it is.</p>'
    return html.replace("<head>", f"<head>{known}", 1).replace("<body>", f"<body>{said}", 1)


def works(literature: str) -> dict[str, tuple[str, str]]:
    "Key and entry of each address in the list of references of the rendered page on literature."
    entries = re.findall(r'(<div id="ref-(\w+)" class="csl-entry".*?</div>)', literature, re.DOTALL)
    return {
        unescape(address): (key, entry)
        for entry, key in entries
        for address in re.findall(r'href="([^"]+)"', entry)
    }


def cite(html: str, known: dict[str, tuple[str, str]]) -> str:
    "`html` with the links of its main part to known works as citations, and a list of them."
    cited, (head, *rest) = {}, re.split(r"(?=<main)|(?=</main>)", html, maxsplit=2)
    main, foot = rest or ("", "")

    def citation(link: re.Match) -> str:
        if unescape(link[1]) not in known:
            return link[0]
        key, cited[key] = known[unescape(link[1])]
        return (
            f'<span class="citation" data-cites="{key}"><a role="doc-biblioref"{link[0][2:]}</span>'
        )

    main = re.sub(r'<a href="(https?://[^"]+)"[^>]*>.*?</a>', citation, main, flags=re.DOTALL)
    entries = "\n".join(cited[key] for key in sorted(cited))
    references = f"""<section class="quarto-appendix-contents" role="doc-bibliography"
 aria-label="References">
<h2>References</h2><div id="refs" class="references csl-bib-body hanging-indent" role="list">
{entries}
</div></section>
"""
    return f"{head}{main}{references}{foot}" if cited else html


def offer(html: str, notebook: str) -> str:
    """`html` with a link to the notebook (its path in nbs/), which lies beside the page, and one
    that opens it in Colab."""
    colab = f"https://colab.research.google.com/{REPOSITORY}/nbs/{notebook}"
    items = (
        f'<li><a href="{colab}" class="toc-action"><i class="bi bi-play-circle"></i>Open in'
        f' Colab</a></li><li><a href="{Path(notebook).name}" download class="toc-action"><i'
        ' class="bi bi-download"></i>Download notebook</a></li>'
    )
    return re.sub(r'(<div class="toc-actions[^>]*><ul>)', rf"\1{items}", html)


if __name__ == "__main__":
    pages = [Path(name) for name in os.environ.get("QUARTO_PROJECT_OUTPUT_FILES", "").splitlines()]
    site = Path(os.environ.get("QUARTO_PROJECT_OUTPUT_DIR", ".")).resolve()
    # nbdev drops the number of a notebook from the name of its page
    notebooks = {
        file.relative_to(NBS).with_name(re.sub(r"^\d+_", "", file.stem) + ".html"): file
        for file in NBS.rglob("*.ipynb")
    }
    # also where a single page is rendered, beside the others of an earlier time
    literature = site / "literature.html"
    known = works(literature.read_text(encoding="utf-8")) if literature.exists() else {}
    for page in pages:
        if page.suffix == ".html":
            before = page.read_text(encoding="utf-8")
            place = page.resolve().relative_to(site)
            after = mend(before, len(place.parts) - 1)
            if place in notebooks:
                notebook = notebooks[place]
                after = offer(cite(after, known), notebook.relative_to(NBS).as_posix())
                shutil.copy(notebook, page.parent)
            elif page.name != "literature.html":
                after = cite(after, known)
            if (source := NBS / place.with_suffix(".qmd")).exists():
                after = sourced(after, source.read_text(encoding="utf-8"))
            if after != before:
                page.write_text(after, encoding="utf-8")
    for page in site.rglob("*.html") if "QUARTO_PROJECT_OUTPUT_DIR" in os.environ else ():
        before = page.read_text(encoding="utf-8")
        if "var redirects = {" in before and "canonical" not in before:
            page.write_text(lead(before), encoding="utf-8")
    for page in site.rglob("*-preview.html") if "QUARTO_PROJECT_OUTPUT_DIR" in os.environ else ():
        page.unlink()  # of notebooks, which have pages of their own
