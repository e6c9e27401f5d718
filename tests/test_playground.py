"""The playground in headless Chromium: its training step against rotvq, what its page promises, and
its controls."""

import json
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rotvq import VectorQuantizer
from test_explorables import NBS, TRICKS, in_browser, needs_browser

pytestmark = pytest.mark.slow

PAGE = (NBS / "playground.qmd").read_text(encoding="utf-8")
BODY = "".join(re.findall(r"^<div class=\"playground.*$", PAGE, re.MULTILINE))
SCRIPTS = "rotvq.js", "playground.js"
STATE = """
  const weights = (toy) => toy.layers.map((layer) => [layer.weight, layer.bias]);
  const state = (toy) => JSON.parse(JSON.stringify({layers: weights(toy), codebook: toy.codebook, sums: toy.sums, counts: toy.counts}));"""


def double(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def trained_here(start: dict, batches: list, options: dict) -> dict:
    "The same steps by PyTorch and rotvq."
    coders = nn.ModuleList(
        nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)) for _ in range(2)
    ).double()
    layers = [coders[0][0], coders[0][2], coders[1][0], coders[1][2]]
    vq = VectorQuantizer(
        2,
        options["codes"],
        estimator=options["estimator"],
        distance=options["lookup"],
        decay=options["decay"],
        commitment=options["commitment"],
    ).double()
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers, start["layers"]):
            layer.weight.copy_(double(weight))
            layer.bias.copy_(double(bias))
        for name in ("codebook", "sums", "counts"):
            getattr(vq, name).copy_(double(start[name]))
    opt = torch.optim.Adam(coders.parameters(), lr=options["lr"])
    for x in map(double, batches):
        q, _, loss = vq(coders[0](x))
        loss = loss + (coders[1](q) - x).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return {
        "layers": [(layer.weight, layer.bias) for layer in layers],
        "codebook": vq.codebook,
        "sums": vq.sums,
        "counts": vq.counts,
        "weight": vq.rotation_weight().item(),
    }


@needs_browser
@pytest.mark.filterwarnings("ignore:At training batch 10")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "ste", "commitment": 0.25, "start": "uniform"},
        {"estimator": "reflection", "lr": 0.003},
        {"estimator": "rotation-until-used", "codes": 32},
        {"lookup": "cosine", "decay": 0.99, "start": "normal"},
    ],
)
def test_steps_agree_with_the_package(tmp_path, options):
    options = {
        "estimator": "rotation",
        "lookup": "euclidean",
        "decay": 0.8,
        "commitment": 1,
        "lr": 0.01,
        "seed": 3,
        "codes": 64,
    } | options
    answer = in_browser(
        tmp_path,
        STATE
        + f"""
      const toy = new rotvq.Toy({json.dumps(options)}), out = {{start: state(toy), batches: []}};
      for (let k = 0; k < 60; k++) {{ const x = toy.draw(128); out.batches.push(x); toy.step(x); }}
      return {{...out, end: state(toy), weight: toy.weight()}};""",
        scripts=SCRIPTS,
    )
    expected = trained_here(answer["start"], answer["batches"], options)
    if options["codes"] == 32:
        assert (
            answer["weight"] == expected["weight"] and 0 < answer["weight"] < 1
        )  # of 60 batches, a window of 40
    for (weight, bias), (w, b) in zip(answer["end"]["layers"], expected["layers"]):
        assert_close(double(weight), w.detach(), rtol=1e-6, atol=1e-8)
        assert_close(double(bias), b.detach(), rtol=1e-6, atol=1e-8)
    for name in ("codebook", "sums", "counts"):
        assert_close(double(answer["end"][name]), expected[name].double(), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(double(answer["start"]["codebook"]), expected["codebook"].double())


@needs_browser
def test_what_the_page_says_comes_true(tmp_path):
    answer = in_browser(
        tmp_path,
        """
      const seen = (options, marks) => { const toy = new rotvq.Toy(options), out = {};
        for (let k = 1; k <= Math.max(...marks); k++) { toy.step(); if (marks.includes(k)) out[k] = toy.measure(); }
        return Object.fromEntries(Object.entries(out).map(([k, {used, mse}]) => [k, {used, mse}])); };
      const out = {};
      for (const estimator of ["ste", "rotation"]) out[estimator] = [1, 2, 3, 4, 5].map((seed) => ({
        plain: seen({estimator, seed}, [1000, 3000]), revival: seen({estimator, seed, revive: 50}, [100, 3000])}));
      for (const [start, ...steps] of [["kmeans", 100, 200], ["normal", 1000]]) out[start] = steps.flatMap((step) => [1, 2, 3, 4, 5].map((seed) =>
        ["ste", "rotation"].map((estimator) => seen({estimator, seed, start}, [step])[step])));
      for (const key of ["collapse", "far"]) { const {set, until} = rotvq.presets[key], long = key === "collapse" ? 3000 : until;
        const options = Object.fromEntries(Object.entries(set).map(([k, v]) => [k, Number.isNaN(Number(v)) ? v : Number(v)]));
        out[key] = [1, 2, 3, 4, 5].map((seed) => ["ste", "rotation"].map((estimator) => {
          const both = seen({estimator, seed, ...options}, [until, long]); return [both[until], both[long]]; })); }
      out.mirror = [1, 2, 3].map((seed) => seen({estimator: "reflection", seed}, [1000])[1000].mse);
      out.handed = [1, 2, 3, 4, 5].map((seed) => { const toy = new rotvq.Toy({seed});
        for (let k = 0; k < 3000; k++) { if (k === 1000) toy.options.estimator = "ste"; toy.step(); }
        const {used, mse} = toy.measure(); return {used, mse}; });
      out.rule = [1, 2, 3, 4, 5].map((seed) => { const toy = new rotvq.Toy({seed, estimator: "rotation-until-used"}), weights = [toy.weight()];
        const seen = {}; for (let k = 1; k <= 3000; k++) { toy.step(); if (k === 1000 || k === 3000) { seen[k] = toy.measure(); weights.push(toy.weight()); } }
        return {used: [seen[1000].used, seen[3000].used], mse: seen[3000].mse, weights}; });
      const first = new rotvq.Toy({seed: 2}), same = new rotvq.Toy({seed: 2}), other = new rotvq.Toy({seed: 4});
      for (const toy of [first, same, other]) for (let k = 0; k < 5; k++) toy.step();
      out.same = JSON.stringify(first.codebook) === JSON.stringify(same.codebook);
      out.other = JSON.stringify(first.codebook) === JSON.stringify(other.codebook);
      return out;""",
        scripts=SCRIPTS,
    )
    used = lambda name, kind, step: [run[kind][step]["used"] for run in answer[name]]
    ste, rotation = used("ste", "plain", "1000"), used("rotation", "plain", "1000")
    late = used("ste", "plain", "3000")
    said = re.search(
        r"after 1,000 steps more than (\d+) of 64 are in use against fewer than (\d+), in five",
        PAGE,
    ).groups()
    assert min(rotation) > int(said[0]) and max(ste) < int(said[1])
    assert min(late) > int(
        re.search(r"After 3,000 steps straight-through has more than (\d+)", PAGE).group(1)
    )
    assert min(used("ste", "revival", "100") + used("rotation", "revival", "100")) >= 55
    lower = [
        a["revival"]["3000"]["mse"] < b["revival"]["3000"]["mse"]
        for a, b in zip(answer["ste"], answer["rotation"])
    ]
    assert sum(lower) >= 3
    assert min(both["used"] for both in answer["handed"]) > 55
    assert (
        sum(
            both["mse"] < run["plain"]["3000"]["mse"]
            for run, both in zip(answer["rotation"], answer["handed"])
        )
        >= 3
    )
    rule, straight = answer["rule"], [run["plain"]["3000"]["mse"] for run in answer["ste"]]
    assert min(run["used"][1] for run in rule) >= int(
        re.search(r"After 3,000 steps it has (\d+) or more", PAGE).group(1)
    )
    assert all(
        run["weights"][0] == 1 and 0 < run["weights"][1] < 0.5 and run["weights"][2] == 0
        for run in rule
    )
    assert all(run["mse"] < mse for run, mse in zip(rule, straight))
    assert all(run["used"][0] < count for run, count in zip(rule, rotation))
    assert sum(rotation["mse"] < ste["mse"] for ste, rotation in answer["kmeans"]) >= 9
    assert sum(ste["mse"] < rotation["mse"] for ste, rotation in answer["normal"]) >= 4
    assert (
        min(model["used"] for pair in answer["normal"] for model in pair) > 55
        and min(answer["mirror"]) > 0.1
    )
    assert answer["same"] and not answer["other"]
    # the gap that the page opens with, early and late; and none far from the origin
    said = re.search(
        r"At step 600 it uses (\d+) to (\d+) of 64 codes, .* and the rotation (\d+); .* at step"
        r" 3,000 it has (\d+) to (\d+) against (\d+) to (\d+)",
        PAGE,
    ).groups()
    counts = [
        [pair[side][when]["used"] for pair in answer["collapse"]]
        for when in (0, 1)
        for side in (0, 1)
    ]
    found = [bound for each in counts for bound in (min(each), max(each))]
    said = [*said[:3], *said[2:]]  # one number for the rotation at step 600
    # browsers round sines in their own ways
    assert all(abs(count - int(number)) <= 2 for count, number in zip(found, said, strict=True))
    assert found[1] < 8 < found[2] and found[5] < found[6]
    for straight, rotated in answer["collapse"]:
        assert all(b["mse"] < a["mse"] for a, b in zip(straight, rotated))
    assert sum(pair[0][0]["used"] == pair[1][0]["used"] == 1 for pair in answer["far"]) == 4


@needs_browser
def test_controls(tmp_path):
    answer = in_browser(
        tmp_path,
        """
      window.requestAnimationFrame = (act) => setTimeout(act, 16);           // frames of the browser's virtual time
      const root = document.querySelector(".playground-training"), button = (text) => [...root.querySelectorAll("button")].find((b) => b.textContent === text);
      const later = (frames) => new Promise((done) => { const next = (n) => n ? requestAnimationFrame(() => next(n - 1)) : done(); next(frames); });
      const out = {labels: [...document.querySelectorAll("select, input")].every((x) => x.labels.length || x.getAttribute("aria-label"))};
      const toys = () => root.playground.toys();
      await later(5); out.itself = root.playground.playing();                // it starts when it is seen
      button("Pause").click(); out.until = toys()[0].steps; button("Start again").click(); out.start = toys().map((toy) => toy.steps);
      button("One step").click(); out.one = toys().map((toy) => toy.steps);
      button("Play").click(); out.playing = root.playground.playing(); await later(5);
      button("Pause").click(); out.played = toys()[0].steps; await later(3); out.paused = toys()[0].steps;
      out.said = root.querySelector(".rotvq-says").textContent;
      const choose = (label, value) => { const select = [...root.querySelectorAll("label")].find((l) => l.firstChild.textContent.trim() === label).querySelector("select");
        select.value = value; select.dispatchEvent(new Event("change")); };
      choose("estimator", "reflection"); out.kept = toys()[0].steps; out.estimator = toys()[0].options.estimator;
      const pressed = () => [...root.querySelectorAll("[aria-pressed=true]")].map((b) => b.textContent);
      out.pressed = pressed();                                                // none: an estimator was changed
      button("Play").click(); button("Pause").click(); button("Play").click(); const from = toys()[0].steps; let frames = 0;
      await new Promise((done) => { const next = () => { frames += 1; frames < 20 ? requestAnimationFrame(next) : done(); }; requestAnimationFrame(next); });
      out.pace = (toys()[0].steps - from) / frames; button("Pause").click();      // one loop, whatever was pressed
      choose("decay", "0.8"); out.reset = toys()[0].steps; out.decay = toys()[1].options.decay; out.own = pressed();
      button("Far from the origin").click(); out.far = [toys()[0].options.shift, toys()[0].options.decay, ...pressed()];
      button("Collapse").click(); choose("steps a frame", "32"); await later(40);   // it stops at step 600, and goes on when told
      out.stopped = [toys()[0].steps, root.playground.playing()]; button("Play").click(); await later(5); out.on = toys()[0].steps; button("Pause").click();
      const canvas = root.querySelector("canvas"), pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      out.drawn = new Set(pixels).size;
      const figure = document.querySelector(".playground-step .rotvq-explorable"), panel = document.querySelector(".playground-step");
      rotvq.draw(figure);                                  // it waits until it is near
      out.before = figure.rotvq.drawn.gradient; out.state = figure.rotvq.state;
      const [estimator, length] = panel.querySelectorAll("select"), gamma = panel.querySelector("input");
      length.value = "own"; length.dispatchEvent(new Event("change")); gamma.value = .5; gamma.dispatchEvent(new Event("input"));
      out.half = figure.rotvq.drawn.gradient; out.after = figure.rotvq.drawn.after; out.cell = figure.rotvq.drawn.cell;
      estimator.value = "ste"; estimator.dispatchEvent(new Event("change")); out.ste = figure.rotvq.drawn.gradient;
      figure.rotvq.move("z", [-1, -1]); panel.querySelector("button").click(); out.back = figure.rotvq.state;
      return out;""",
        BODY,
        SCRIPTS,
    )
    assert answer["itself"] and answer["until"] > 0 and answer["pressed"] == []
    assert answer["own"] == [] and answer["far"] == [3, 0.8, "Far from the origin"]
    assert answer["stopped"] == [600, False] and answer["on"] > 600
    assert (
        answer["labels"]
        and answer["start"] == [0, 0]
        and answer["one"] == [1, 1]
        and answer["playing"]
    )
    assert (
        answer["played"] > 1
        and answer["paused"] == answer["played"]
        and "straight-through" in answer["said"]
    )
    assert answer["pace"] < 3  # two steps a frame
    assert answer["kept"] == answer["played"] and answer["estimator"] == "reflection"
    assert answer["reset"] == 0 and answer["decay"] == 0.8 and answer["drawn"] > 10
    state = {k: double(v) for k, v in answer["state"].items()}

    def gradient(z, gamma=None):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(
            TRICKS["rotation"](z, state["q"].expand_as(z), gamma=gamma), z, state["g"].expand_as(z)
        )[0]

    assert_close(double(answer["before"]), gradient(state["z"]))
    assert_close(double(answer["half"]), gradient(state["z"], 0.5))
    cell = double(answer["cell"])
    assert_close(double(answer["after"]), cell - 0.4 * gradient(cell, 0.5))
    assert answer["ste"] == answer["state"]["g"]
    for name, value in answer["state"].items():
        assert_close(double(answer["back"][name]), double(value))


@needs_browser
def test_the_landing_page_opens_with_a_collapse(tmp_path):
    "Two panels of the same setting, without controls; it starts, and stops, by itself."
    held = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in held for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    (page,) = (html for o in outputs if "data-hero" in (html := "".join(o["data"]["text/html"])))
    answer = in_browser(
        tmp_path,
        """
      window.requestAnimationFrame = (act) => setTimeout(act, 16);
      const root = document.querySelector("[data-hero]"), toys = root.playground.toys;
      const seen = (part) => part.getClientRects().length > 0;
      for (let k = 0; k < 400 && !(toys()[0].steps >= 600); k++) await new Promise((done) => setTimeout(done, 20));
      return {steps: toys().map((toy) => toy.steps), used: toys().map((toy) => toy.seen.used), playing: root.playground.playing(),
        buttons: [...root.querySelectorAll("button")].filter(seen).map((b) => b.textContent), selects: [...root.querySelectorAll("select")].filter(seen).length,
        names: [...root.querySelectorAll("output")].map((o) => o.textContent), canvases: [...root.querySelectorAll("canvas")].filter(seen).length,
        labels: [...root.querySelectorAll("canvas")].filter(seen).every((c) => c.getAttribute("aria-label"))};""",
        page,
        SCRIPTS,
    )
    assert answer["steps"] == [600, 600] and not answer["playing"] and answer["labels"]
    assert answer["used"][0] < 8 < answer["used"][1]
    assert answer["buttons"] == ["Play", "Start again"] and answer["selects"] == 0
    assert answer["names"] == ["straight-through", "rotation"] and answer["canvases"] == 2
