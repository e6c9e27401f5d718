"""The script of the moving figures, run in headless Chromium: its formulas against rotvq, its
scenes by keyboard and pointer."""

import ast
import json
import math
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rotvq import (
    nearest_code,
    reflect,
    reflection_trick,
    rotation_trick,
    rotation_until_used,
    straight_through,
)
from rotvq.layer.lookup import code_sums

pytestmark = pytest.mark.slow

NBS = Path(__file__).resolve().parent.parent / "nbs"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
TRICKS = {"ste": straight_through, "rotation": rotation_trick, "reflection": reflection_trick}
FIGURES = [
    ("index", "rotation"),
    ("book/01_vqvae", "means"),
    ("book/02_ste", "lookup"),
    ("book/03_householder", "mirrors"),
    ("book/03_householder", "twice"),
    ("book/04_rotation", "rotation"),
    ("book/12_reflection", "mirror"),
    ("book/05_scaling", "origin"),
]
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)


def figure(name: str, scene: str) -> str:
    "The stored HTML of a moving figure of a chapter."
    cells = json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    pages = ("".join(o["data"]["text/html"]) for o in outputs)
    (html,) = (page for page in pages if f'data-scene="{scene}"' in page)
    return html


def in_browser(
    tmp_path: Path, script: str, body: str = "", scripts: tuple[str, ...] = ("rotvq.js",)
) -> object:
    """What the JavaScript expression or async function body `script` returns on a page with `body`
    and the scripts."""
    (tmp_path / "assets").mkdir(exist_ok=True)
    for file in (*scripts, "rotvq.css"):
        shutil.copy(NBS / "assets" / file, tmp_path / "assets")
    tags = "".join(f'<script src="assets/{file}"></script>' for file in scripts)
    page = tmp_path / "page.html"
    page.write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><link rel="stylesheet" href="assets/rotvq.css"><body>{body}
{tags}<pre id="answer"></pre><script>
window.addEventListener("load", async () => {{
  let answer;
  try {{ answer = await (async () => {{ {script} }})(); }} catch (error) {{ answer = {{error: String(error)}}; }}
  document.getElementById("answer").textContent = JSON.stringify(answer);
}});</script>""",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=400,
    )
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    answer = json.loads(unescape(found.group(1)))
    assert not (isinstance(answer, dict) and "error" in answer), answer
    return answer


def test_each_chapter_has_its_figure():
    for chapter, scene in FIGURES:
        html = figure(chapter, scene)
        assert '<script src="assets/rotvq.js">' in html
        assert 'src="data:image/png;base64,' in html, "no still picture for readers without scripts"
        if said := re.search(r"(\d+) degrees apart", html):  # the text that stands for the picture
            start = json.loads(unescape(re.search(r'data-start="([^"]*)"', html)[1]))
            one, other = ("a", "b") if scene == "mirrors" else ("z", "q")
            turn = math.atan2(start[other + "2"], start[other + "1"]) - math.atan2(
                start[one + "2"], start[one + "1"]
            )
            assert abs(math.degrees(turn) - int(said[1])) < 1, chapter
    script = (NBS / "assets" / "rotvq.js").read_text(encoding="utf-8")
    assert not re.search(
        r"(src|href|fetch|import)\W*[\"'`]?https?:",
        script.replace('"http://www.w3.org/2000/svg"', ""),
    ), "asks another host"


@needs_browser
def test_formulas_agree_with_the_package(tmp_path):
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 6, generator=gen, dtype=torch.float64)
    special = [
        [0, 0, 1, 2, 3, 4],
        [1, 2, 0, 0, 3, 4],
        [1, 0, -2, 0, 3, 4],
        [1, 0, 2, 0, 3, 4],
        [1, 2, -1, -2, 0.3, -0.7],
    ]
    rows = torch.cat([rows, torch.tensor(special, dtype=torch.float64)])
    z, q, g = rows.view(-1, 3, 2).unbind(1)
    answer = in_browser(
        tmp_path,
        f"""
      const rows = {json.dumps(rows.tolist())}, out = {{}};
      for (const name of ["ste", "rotation", "reflection"])
        out[name] = rows.map((r) => rotvq.gradients[name](r.slice(0, 2), r.slice(2, 4), r.slice(4)));
      out.mixed = rows.map((r) => rotvq.gradients["rotation-until-used"](r.slice(0, 2), r.slice(2, 4), r.slice(4), undefined, .3));
      out.half = rows.map((r) => rotvq.gradients.rotation(r.slice(0, 2), r.slice(2, 4), r.slice(4), .5));
      out.reflect = rows.map((r) => rotvq.reflect(r.slice(0, 2), r.slice(2, 4)));
      out.nearest = rows.map((r) => rotvq.nearest(r.slice(0, 2), rotvq.codes));
      out.codes = rotvq.codes;
      out.points = rotvq.points;
      return out;""",
    )
    as_tensor = lambda name: torch.tensor(answer[name], dtype=torch.float64)
    for name, trick in TRICKS.items():
        point = z.clone().requires_grad_()
        assert_close(as_tensor(name), torch.autograd.grad(trick(point, q), point, g)[0])
    point = z.clone().requires_grad_()
    assert_close(
        as_tensor("half"), torch.autograd.grad(rotation_trick(point, q, gamma=0.5), point, g)[0]
    )
    point = z.clone().requires_grad_()
    assert_close(
        as_tensor("mixed"), torch.autograd.grad(rotation_until_used(point, q, 0.3), point, g)[0]
    )
    assert_close(as_tensor("reflect"), reflect(z, q))
    assert answer["nearest"] == nearest_code(z, as_tensor("codes")).tolist()
    for chapter, name in (("book/02_ste", "codes"), ("book/01_vqvae", "points")):
        cells = json.loads((NBS / f"{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
        source = "".join(line for cell in cells for line in cell["source"])
        drawn = re.search(
            name.upper() + r" = torch\.tensor\(\s*(\[\s*\[.*?\]\s*,?\s*\])\s*\)", source, re.DOTALL
        ).group(1)
        assert ast.literal_eval(drawn) == answer[name], (
            "the chapter and the script draw different ones"
        )


@needs_browser
@pytest.mark.parametrize(("chapter", "scene"), FIGURES)
def test_figures_move_by_keyboard_and_pointer(tmp_path, chapter, scene):
    html = figure(chapter, scene)
    answer = in_browser(
        tmp_path,
        """
      const element = document.querySelector(".rotvq-explorable"), out = {names: [], says: []};
      rotvq.draw(element);                                 // it waits until it is near
      out.picture_left = !!element.querySelector("img");
      out.start = JSON.parse(element.dataset.start);
      out.said = element.querySelector(".rotvq-says").textContent;
      const [, , right, bottom] = element.querySelector("svg").getAttribute("viewBox").split(" ").map(Number);
      out.outside = [...element.querySelectorAll("svg polygon")].flatMap((shape) => [...shape.points]).filter((p) => p.x < -1 || p.y < -1 || p.x > right + 1 || p.y > bottom + 1).length;
      for (const handle of element.querySelectorAll(".rotvq-handle")) {
        const name = Object.keys(rotvq.scenes[element.dataset.scene].points)[out.names.length];
        const before = [...element.rotvq.state[name]];
        handle.focus();
        handle.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
        handle.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowUp", shiftKey: true, bubbles: true}));
        const keyed = [...element.rotvq.state[name]];
        const box = element.querySelector("svg").getBoundingClientRect();
        let held = false;
        handle.setPointerCapture = () => { held = true; };          // synthetic pointers cannot be captured
        handle.hasPointerCapture = () => held;
        const at = {pointerId: 1, clientX: box.left + .6 * box.width, clientY: box.top + .3 * box.height, bubbles: true};
        handle.dispatchEvent(new PointerEvent("pointermove", at));
        const unheld = [...element.rotvq.state[name]];
        handle.dispatchEvent(new PointerEvent("pointerdown", at));
        handle.dispatchEvent(new PointerEvent("pointermove", at));
        const on = rotvq.scenes[element.dataset.scene].points[name].on;
        const foot = on ? element.rotvq.state[on] : [0, 0];
        out.names.push({name, before, keyed, unheld, held: element.rotvq.state[name].map((x, i) => x + foot[i]), role: handle.getAttribute("role"),
          label: handle.getAttribute("aria-label"), value: handle.getAttribute("aria-valuetext"), focus: document.activeElement === handle});
      }
      out.low = rotvq.scenes[element.dataset.scene].low ?? -2.2;
      out.later = element.querySelector(".rotvq-says").textContent;
      out.means = element.rotvq.drawn.means; out.loss = element.rotvq.drawn.loss; out.points = rotvq.points;
      const kept = structuredClone(element.rotvq.state), drawn = element.rotvq.drawn;
      element.querySelector(".rotvq-bar button").click();
      out.reset = structuredClone(element.rotvq.state);
      element.rotvq.drawn = drawn;
      out.state = kept; out.grads = element.rotvq.drawn.grads || {}; out.images = element.rotvq.drawn.images;
      return out;""",
        html,
    )
    for name, place in answer["reset"].items():
        assert place == [answer["start"][name + "1"], answer["start"][name + "2"]]
    assert answer["outside"] == 0, "an arrow leaves the figure"
    assert not answer["picture_left"] and answer["said"] and answer["later"] != answer["said"]
    for point in answer["names"]:
        name, before = point["name"], point["before"]
        assert before == [answer["start"][name + "1"], answer["start"][name + "2"]]
        assert_close(
            torch.tensor(point["keyed"]), torch.tensor([before[0] + 0.05, before[1] + 0.25])
        )
        assert point["unheld"] == point["keyed"], "moves without being held"
        assert_close(
            torch.tensor(point["held"]),
            torch.tensor([0.2 * 2.2, 2.2 - 0.3 * (2.2 - answer["low"])]),
            atol=0.02,
            rtol=0,
        )
        assert point["role"] == "slider" and point["label"] and point["value"] and point["focus"]
    state = {k: torch.tensor(v, dtype=torch.float64) for k, v in answer["state"].items()}
    if "g" in state:  # what is drawn is what the package computes
        z, q = state["z"] - state.get("o", 0), state["q"] - state.get("o", 0)
        for name, grad in answer["grads"].items():
            point = z.clone().requires_grad_()
            expected = torch.autograd.grad(TRICKS[name](point, q), point, state["g"])[0]
            assert all(math.isfinite(x) for x in grad)
            assert_close(torch.tensor(grad, dtype=torch.float64), expected)
    if "means" in answer:
        points, codes = torch.tensor(answer["points"]).double(), torch.stack(list(state.values()))
        batch = code_sums(points, nearest_code(points, codes), 3)
        means = torch.where(batch[:, 2:] > 0, batch[:, :2] / batch[:, 2:], codes)
        assert_close(torch.tensor(answer["means"], dtype=torch.float64), means)
        assert answer["loss"] == pytest.approx(
            (points - codes[nearest_code(points, codes)]).square().sum(1).mean().item()
        )
    if scene == "twice":  # twice the angle between the mirrors
        m, n, u = (torch.view_as_complex(state[name]) for name in "mnu")
        turned = u * ((n / n.abs()) / (m / m.abs())) ** 2
        second = torch.tensor(answer["images"]["second"], dtype=torch.float64)
        assert_close(second, torch.view_as_real(turned))


@needs_browser
def test_a_film_shows_the_moment_that_is_chosen(tmp_path):
    cells = json.loads((NBS / "book" / "07_why.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = (o.get("data", {}) for c in cells for o in c.get("outputs", []))
    (html,) = (h for d in outputs if "rotvq-film" in (h := "".join(d.get("text/html", ""))))
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html)[1])
    answer = in_browser(
        tmp_path,
        """
      const film = document.querySelector(".rotvq-film"), slider = () => film.querySelector("input");
      rotvq.draw(film);
      return [0, 7].map((k) => {
        slider().value = k;
        slider().dispatchEvent(new Event("input"));
        return [...film.querySelectorAll("svg")].map((svg) => ({said: svg.getAttribute("aria-label"),
          used: svg.querySelectorAll(".rotvq-used").length, all: svg.querySelectorAll("circle").length}));
      });""",
        html,
    )
    for k, views in zip((0, 7), answer):
        for view, panel in zip(views, data["panels"], strict=True):
            assert view["used"] == panel["count"][k] == len(panel["used"][k])
            assert view["all"] == view["used"] + len(panel["z"][k])
            assert f"{panel['count'][k]} codes in use, {panel['notes'][k]}" in view["said"]
            assert view["said"].endswith(data["moments"][k])
