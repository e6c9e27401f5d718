"""README.md from nbs/index.ipynb, so that the landing page is written once, and its picture from
the chapter that draws it.

`--check` only compares."""

import base64
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def site() -> str:
    "Where the site is published."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["doc_host"] + config["DEFAULT"]["doc_baseurl"]


def readme(notebook: dict) -> str:
    """Markdown of `notebook`: hidden cells left out, directives dropped, links and pictures
    relative to the project's root."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        directives = set(re.findall(r"^#\| *(.+?) *$", source, re.MULTILINE))
        if cell["cell_type"] == "markdown":
            source = re.sub(r"\)\{\.btn[^}]*\} *(?=\[)", ") · ", source)  # buttons of the site
            source = re.sub(r"\)\{\.btn[^}]*\}", ")", source)
            for page in ("playground", "twenty"):  # they move
                source = source.replace(f"]({page}.qmd)", f"]({site()}/{page}.html)")
            parts.append(re.sub(r"\]\((?!https?://|#)([^)]+)\)", r"](nbs/\1)", source))
        elif "hide" not in directives:
            code = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()
            if "echo: false" not in directives:
                parts.append(f"```python\n{code}\n```")
            text = "".join("".join(output.get("text", "")) for output in cell["outputs"]).rstrip()
            if text:
                parts.append(f"```text\n{text}\n```")
            tables = (
                "".join(output.get("data", {}).get("text/markdown", ""))
                for output in cell["outputs"]
            )
            parts += [table for table in tables if table]
    return (
        "<!-- Made from nbs/index.ipynb by `make export`; edit there. -->\n\n"
        + "\n\n".join(parts)
        + "\n"
    )


def picture(notebook: dict, label: str) -> bytes:
    "The PNG that the cell of this label has drawn."
    cell = next(
        cell for cell in notebook["cells"] if f"#| label: {label}\n" in "".join(cell["source"])
    )
    return base64.b64decode(
        next(
            "".join(output["data"]["image/png"])
            for output in cell["outputs"]
            if "image/png" in output.get("data", {})
        )
    )


if __name__ == "__main__":
    text = readme(json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")))
    learning = json.loads((ROOT / "nbs" / "book" / "06_learning.ipynb").read_text(encoding="utf-8"))
    effect = picture(learning, "fig-fill")
    file, image = ROOT / "README.md", ROOT / "nbs" / "images" / "effect.png"
    if "--check" in sys.argv:
        differs = file.read_text(encoding="utf-8") != text or image.read_bytes() != effect
        sys.exit(
            differs
            and "README.md or nbs/images/effect.png differs from the notebooks: run `make export`."
        )
    file.write_text(text, encoding="utf-8")
    image.write_bytes(effect)
