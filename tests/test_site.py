"""The rendered site, where quarto is on PATH: links, hosts, alternative text, contrast, width, and
what moves, in Chromium."""

import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from browser import chromium, served
from helpers import NBS, NOTEBOOKS, PAGES, ROOT, place
from test_explorables import BROWSER
from test_project import cells, copy, nbdev, works  # noqa: F401

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("quarto") is None, reason="quarto is not on PATH"),
]
PREFIX = "/rotvq/"  # of the published site
WIDTHS = 360, 768, 1280, 1920
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]


@pytest.fixture(scope="module")
def site(copy) -> Path:  # noqa: F811
    assert BROWSER, "the tests of the site need chromium, chromium-browser or google-chrome on PATH"
    shutil.copytree(ROOT / "tools", copy / "tools")
    shutil.copy(ROOT / "README.md", copy)
    nbdev("nbdev_docs", copy)
    return copy / "_docs"


class Elements(HTMLParser):
    "Identifiers, links and pictures of a page."

    def __init__(self, page: Path):
        super().__init__()
        self.ids, self.targets, self.pictures = set(), [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        held = dict(attributes)
        self.ids |= {held[key] for key in ("id", "name") if held.get(key)}
        self.targets += [
            held[key]
            for key in ("href", "src")
            if held.get(key)
            and not (tag == "link" and held.get("rel") in ("canonical", "next", "prev"))
        ]
        if tag == "img":
            self.pictures.append(held)


def page_of(site: Path, source: Path) -> Path:
    "nbdev drops the number of a notebook from the name of its page."
    return site / Path(place(source)).with_name(re.sub(r"^\d+_", "", source.stem) + ".html")


def pages(site: Path) -> list[Path]:
    "Those with content: an old address only leads to a page."
    found = sorted(p for p in site.rglob("*.html") if "site_libs" not in p.parts)
    return [p for p in found if "<main" in p.read_text(encoding="utf-8")]


def test_every_notebook_has_its_page_and_lies_beside_it(site):
    for notebook in NOTEBOOKS:
        text = page_of(site, notebook).read_text(encoding="utf-8")
        assert (site / place(notebook)).read_bytes() == notebook.read_bytes()
        assert f'href="{notebook.name}" download' in text
        assert f"blob/main/nbs/{place(notebook)}" in text
        assert 'name="description"' in text or notebook.stem == "index"


def test_links_and_anchors_lead_somewhere(site):
    held, count = {page: Elements(page) for page in pages(site)}, 0
    for page, elements in held.items():
        for target in elements.targets:
            parts = urlparse(target)
            if parts.scheme or parts.netloc or target.startswith("data:"):
                continue
            path = unquote(parts.path)
            assert not path.startswith("/") or path.startswith(PREFIX), (
                f"{page.name}: {target} leaves the site"
            )
            file = (
                page
                if not path
                else (
                    site / path.removeprefix(PREFIX)
                    if path.startswith("/")
                    else (page.parent / path)
                )
            )
            file = (file / "index.html" if file.is_dir() else file).resolve()
            assert file.exists(), f"{page.name}: {target}"
            if parts.fragment and file.suffix == ".html":
                assert unquote(parts.fragment) in held[file].ids, f"{page.name}: {target}"
            count += 1
    assert count > 3000


def test_no_page_asks_another_host(site):
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(
            r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//|<link(?![^>]+rel="canonical")[^>]+href="https?://',
            text,
        ), page.name
    for sheet in site.rglob("*.css"):
        assert not re.findall(
            r"""(?:@import|url\()\s*(?:url\()?["']?(?:https?:)?//""",
            sheet.read_text(encoding="utf-8"),
        ), sheet


def test_pictures_say_what_they_show(site):
    for page in pages(site):
        for picture in Elements(page).pictures:
            assert picture.get("alt"), f"{page.name}: {str(picture)[:200]}"


def test_works_are_cited(site):
    """Links of a notebook to works of the list are citations, with their entries at the end of the
    page."""
    known, count = works(), 0
    for notebook in NOTEBOOKS:
        text = "\n".join(
            "".join(c["source"]) for c in cells(notebook) if c["cell_type"] == "markdown"
        )
        expected = {key for key, address in known.items() if f"]({address})" in text}
        page = page_of(site, notebook).read_text(encoding="utf-8")
        assert (
            set(re.findall(r'data-cites="(\w+)"', page))
            == set(re.findall(r'id="ref-(\w+)"', page))
            == expected
        ), notebook.name
        count += len(expected)
    assert count > 15


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible_and_quiet(site, scheme):
    """No violation of WCAG AA, nothing in the console, no request to another host; the reader's
    preference is followed."""
    from axe_playwright_python.sync_playwright import Axe

    axe, found = Axe(), []
    with (
        served(site, PREFIX) as address,
        chromium(
            viewport={"width": 1280, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        ) as page,
    ):
        page.on("pageerror", lambda error: found.append(f"{page.url}: {error}"))
        page.on(
            "console",
            lambda message: message.type == "error" and found.append(f"{page.url}: {message.text}"),
        )
        page.on(
            "request",
            lambda request: (
                request.url.startswith((address, "data:", "blob:"))
                or found.append(f"{page.url} asks {request.url}")
            ),
        )
        for file in pages(site):
            page.goto(address + file.relative_to(site).as_posix(), wait_until="networkidle")
            light = page.evaluate(
                "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0,"
                " 3).every((x) => x > 200)"
            )
            if light != (scheme == "light"):
                found.append(f"{file.name} is not {scheme}")
            answer = axe.run(
                page, options={"runOnly": RULES, "resultTypes": ["violations"]}
            ).response
            found += [
                f"{file.name}: {v['id']}: {v['nodes'][0]['html'][:200]}"
                for v in answer["violations"]
            ]
    assert not found, "\n".join(found)


def test_nothing_is_wider_than_its_page(site):
    found = []
    with served(site, PREFIX) as address, chromium() as page:
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            for file in pages(site):
                page.goto(address + file.relative_to(site).as_posix())
                wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                broken = page.evaluate(
                    "[...document.querySelectorAll('main table a')].filter((a) =>"
                    " getComputedStyle(a).wordBreak !== 'normal').length"
                )
                if broken:
                    found.append(
                        f"{file.name} at {width}: words of {broken} links in tables may break"
                    )
                if wide > 0:
                    found.append(f"{file.relative_to(site)} at {width}: {wide} px")
    assert not found, "\n".join(found)


def test_the_entry_shows_over_its_citation(site):
    with served(site, PREFIX) as address, chromium() as page:
        page.goto(address + "book/rotation.html")
        page.locator('a[role="doc-biblioref"]').first.hover()
        page.locator(".tippy-box", has_text="Restructuring Vector Quantization").wait_for()


def test_old_addresses_lead_to_the_same_place_of_the_new_pages(site):
    moved = {}
    for source in [*NOTEBOOKS, *PAGES]:
        old = re.search(r"aliases: \[/(\S+\.html)\]", source.read_text(encoding="utf-8"))
        if old and source.parent not in (NBS, NBS / "reference"):
            moved[old[1]] = page_of(site, source).relative_to(site).as_posix()
    assert len(moved) > 50
    for old, new in moved.items():
        link = os.path.relpath(new, Path(old).parent)
        text = (site / old).read_text(encoding="utf-8")
        assert f'href="{link}"' in text and (site / new).exists(), old
    with served(site, PREFIX) as address, chromium() as page:
        for old, place in (
            ("quantizer.html", "#remember"),
            ("reference/kernels.html", "#pullback_agrees"),
        ):
            page.goto(address + old + place)
            page.wait_for_url(address + moved[old] + place)
            assert page.locator(place).count() == 1


@pytest.mark.parametrize(
    "name",
    [
        "index",
        "playground",
        *(f"book/{name}" for name in "vqvae ste householder rotation reflection scaling".split()),
    ],
)
def test_figures_move_by_mouse_touch_and_keyboard(site, name):
    state = "JSON.stringify(document.querySelector('.rotvq-explorable').rotvq.state)"
    with (
        served(site, PREFIX) as address,
        chromium(has_touch=True, viewport={"width": 800, "height": 900}) as page,
    ):
        page.goto(address + name + ".html", wait_until="networkidle")
        devices = page.context.new_cdp_session(page)
        finger = lambda kind, *at: devices.send(
            "Input.dispatchTouchEvent",
            {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in at]},
        )
        figure = page.locator(".rotvq-explorable").first
        handle = figure.locator(".rotvq-handle").first
        figure.evaluate("(x) => x.scrollIntoView({block: 'center', behavior: 'instant'})")
        page.wait_for_function("document.querySelector('.rotvq-explorable').rotvq")  # when near
        seen, values = [page.evaluate(state)], [handle.get_attribute("aria-valuetext")]
        for way in ("mouse", "touch", "keyboard"):
            box = handle.locator(".rotvq-dot").bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            if way == "mouse":
                page.mouse.move(x, y)
                page.mouse.down()
                page.mouse.move(x - 30, y + 20, steps=4)
                page.mouse.up()
            elif way == "touch":
                finger("touchStart", (x, y))
                for k in range(1, 5):
                    finger("touchMove", (x + 8 * k, y - 5 * k))
                finger("touchEnd")
            else:
                handle.focus()
                page.keyboard.press("Shift+ArrowRight")
            page.wait_for_function(f"(before) => {state} !== before", arg=seen[-1])
            seen.append(page.evaluate(state))
            values.append(handle.get_attribute("aria-valuetext"))
            assert values[-1] != values[-2], f"{name}: {way}"
        figure.locator("..").get_by_role("button", name="Reset").first.tap()
        assert page.evaluate(state) == seen[0]


def test_verdicts_are_seen_on_a_phone(site):
    with served(site, PREFIX) as address, chromium(viewport={"width": 390, "height": 844}) as page:
        page.goto(address + "claims.html")
        verdicts = page.locator(".claims-cards td:nth-child(5)")
        assert verdicts.count() > 40
        for box in (verdicts.nth(k).bounding_box() for k in range(verdicts.count())):
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_the_playground_trains_by_mouse_touch_and_keyboard(site):
    steps = (
        "document.querySelector('.playground-training').playground.toys().map((toy) => toy.steps)"
    )
    with served(site, PREFIX) as address, chromium(has_touch=True) as page:
        page.goto(address + "playground.html", wait_until="networkidle")
        play = page.locator(".playground-training .playground-play")
        page.wait_for_function(f"{steps}[0] > 0")  # it starts by itself
        play.click()
        for press in (play.click, play.tap, lambda: (play.focus(), page.keyboard.press("Enter"))):
            before = page.evaluate(steps)
            press()
            page.wait_for_timeout(700)
            press()  # pause
            after = page.evaluate(steps)
            page.wait_for_timeout(200)
            assert after[0] == after[1] > before[0] and page.evaluate(steps) == after
