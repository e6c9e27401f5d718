"""nbs/benchmarks.qmd and its figures from the results of benchmarks/*.py. `--check` only compares the page."""
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results"
INTRO = """---
title: "Benchmarks"
---

<!-- Made by tools/benchmarks_page.py from nbs/results/; edit there. -->

All candidates of a shape take turns in one run, so compare down a column; absolute times belong to the machine named below each
table. Every run checks first that the candidates compute the same: the estimators the same gradients (all but straight-through),
the layers the same indices.
"""
ESTIMATORS = """
## The rotation trick, forward and backward {{#estimators-{device}}}

`python benchmarks/estimators.py` times the value and its gradient to `z` for N vectors of d numbers, float32, against plain straight-through
(`z + (q − z).detach()`), `rotate_to` of `vector_quantize_pytorch` 1.32, and the formula written as batched matrix products.
Median in milliseconds (quartiles within {spread:.0%} of it at most, half of them within {typical:.1%}); "compiled" is one graph by `torch.compile`.
"""
QUANTIZER = """
## The layer {{#quantizer-{device}}}

`python benchmarks/quantizer.py` times a training step (forward, backward to `z`, and the update of the codebook) and a lookup, for N
vectors of d numbers, normally distributed, and K codes, float32, decay 0.8. `vector_quantize_pytorch` 1.32 has the same settings, with the
rotation trick; "plain" is a layer written from the paper of the VQ-VAE with `torch.cdist` and a one-hot matrix. "Product and argmax" is the
product of all vectors with all codes, a tile of 2²⁰ scores at a time, and the `argmax` of each row: no gradient, no learning.
Median in milliseconds (quartiles within {spread:.0%} of it at most, half of them within {typical:.1%}).
"""
TRAFFIC = """
## What a GPU has to move {{#traffic}}

`python benchmarks/traffic.py` counts, with PyTorch {torch} and without a GPU: every operation that is no view is one kernel, which reads
its arguments and writes its results; an operator of `rotvq` counts as what a GPU runs for it. Bytes are multiples of those of `z` in float32. Operations
like these are limited by memory on a GPU, and by the launches where tensors are small. No GPU has run the kernels of
[the GPU room](85_gpu.ipynb) yet; what is counted is
the memory that they are given, each tensor once (the search reads the codes again for every 64 vectors, from the second-level
cache where they fit into it).

The rotation trick, forward and backward. The least that can be done is 4: read g, z and q, write the gradient.
"""
TRAFFIC_LAYER = """
A training step of the layer, with the same settings as above. For vectors of more than 32 numbers, or few of them, the search of
`rotvq` writes scores too, a tile at a time, because there the library's product should be faster than a kernel that keeps them ([an
estimate](85_gpu.ipynb#the-search), here for the 132 processors of an H100); `vector_quantize_pytorch` makes a one-hot matrix.
"""
STEP = """
## Share of a training step {{#step-{device}}}

`python benchmarks/step.py` times whole training steps of the VQ-VAE at the preset `{preset}` (N = {shape[0]}, d = {shape[1]}, K = {shape[2]}),
with several quantizers and with none, where the encoder output goes straight to the decoder. The share is what a step costs more
than that.
"""
TRAINING = """
## Pictures per second {{#training-{device}}}

`python benchmarks/training.py` times whole training steps at the preset `{preset}` with the rotation trick, and the same model around
`VectorQuantize` of `vector_quantize_pytorch` 1.32; and an epoch of batches without a model, ours against `ImageFolder` in a `DataLoader` with a
process for each core, which decodes every picture in every epoch. Ours decodes once ({decoding:.0f} s for {pictures:,} pictures here) and reads bytes from then on.
"""
BARE = "product and argmax"
NAMES = ["rotvq", "rotvq, compiled", "plain STE", "plain STE, compiled", "rotate_to", "rotate_to, compiled", "batched matrices"]


def table(head: list[str], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(head), line(["---"] + ["---:"] * (len(head) - 1)), *map(line, rows)]) + "\n"


def ratios(held: dict, over: str, under: str, key: str = "median_s") -> list[float]:
    "How many times `over` costs what `under` costs, for each shape."
    return [shape["results"][over][key] / shape["results"][under][key] for shape in held["shapes"]]


def spread(results: list[dict]) -> dict:
    "How far quartiles lie from their median: at most, and in half of the cases."
    far = [max(abs(q / r["median_s"] - 1) for q in r["quartiles_s"]) for r in results]
    return {"spread": max(far), "typical": statistics.median(far)}


def estimators(held: dict) -> str:
    "The section of one device."
    machine, shapes = held["machine"], held["shapes"]
    head = ["(N, d)", *(f"({n}, {d})" for n, d in (shape["shape"] for shape in shapes))]
    milli = lambda r: f"{1e3 * r['median_s']:.2f}"
    times = [[name, *(milli(shape["results"][name]) for shape in shapes)] for name in NAMES]
    memory = [[name, *(f"{shape['results'][name]['peak_bytes'] / shape['input_bytes']:.1f}" for shape in shapes)] for name in NAMES]
    pairs = {"rotate_to / rotvq": ("rotate_to", "rotvq"), "rotate_to / rotvq, compiled": ("rotate_to", "rotvq, compiled"),
             "both compiled: rotate_to / rotvq": ("rotate_to, compiled", "rotvq, compiled"),
             "batched matrices / rotvq": ("batched matrices", "rotvq"), "rotvq / plain STE": ("rotvq", "plain STE"),
             "rotvq, compiled / plain STE": ("rotvq, compiled", "plain STE")}
    rates = [[name, *(f"{x:.1f}" for x in values), f"{statistics.median(values):.1f}"]
             for name, values in ((name, ratios(held, *pair)) for name, pair in pairs.items())]
    about = f"{machine['name']}, {machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}, {held['rounds']} rounds."
    return "\n".join([ESTIMATORS.format(device=machine["device"], **spread([r for shape in shapes for r in shape["results"].values()])), table(head, times), about, "",
                      "How many times the first costs what the second costs:", "", table([*head, "median"], rates),
                      "Most memory held at one time, in multiples of the size of `z`. The gradient is one; `rotvq` does not copy the value, `q`; what it makes on the way belongs to one block of rows:", "",
                      table(head, memory), f"![Time of forward and backward, relative to plain straight-through, on a logarithmic axis; thin lines from quartile to quartile. {about}]"
                      f"(images/estimators_{machine['device']}.png)", ""])


def draw(held: dict) -> None:
    import matplotlib.pyplot as plt

    from rotvq import plots

    plots.style()
    fig, ax = plt.subplots(figsize=(8, 3.4))
    shown = {"plain STE": plots.COLORS["ste"], "rotvq, compiled": "#56B4E9", "rotvq": plots.COLORS["rotation"],
             "rotate_to, compiled": "0.75", "rotate_to": "0.45", "batched matrices": "0.2"}
    for i, (name, color) in enumerate(shown.items()):
        x = [k + (i - 2.5) * .14 for k in range(len(held["shapes"]))]
        heights, results = ratios(held, name, "plain STE"), [shape["results"][name] for shape in held["shapes"]]
        ends = [[abs(r["quartiles_s"][k] / r["median_s"] - 1) * h for h, r in zip(heights, results)] for k in (0, 1)]
        ax.bar(x, heights, width=.13, color=color, label=name, yerr=ends, error_kw={"lw": .8})
    ax.set_xticks(range(len(held["shapes"])), [f"({n}, {d})" for n, d in (shape["shape"] for shape in held["shapes"])])
    ax.set(yscale="log", ylabel="time / plain STE")
    fig.legend(loc="outside upper center", ncols=6, fontsize=8)
    fig.savefig(ROOT / "nbs" / "images" / f"estimators_{held['machine']['device']}.png")
    plt.close(fig)


def milli(r: dict) -> str: return f"{1e3 * r['median_s']:.1f}"


def short(x: float) -> str: return f"{x:.3f}" if x < 0.1 else f"{x:.2f}" if x < 2 else f"{x:.1f}"


def about(held: dict) -> str:
    machine = held["machine"]
    return f"{machine['name']}, {machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}, {held['rounds']} rounds."


def quantizer(held: dict) -> str:
    "The section of one device."
    shapes, device = held["shapes"], held["machine"]["device"]
    head = ["(N, d, K)", *("({}, {}, {})".format(*shape["shape"]) for shape in shapes)]
    timed = [r for shape in shapes for kind in ("training", "lookup") for r in shape[kind].values() if "quartiles_s" in r]

    def part(kind: str, names: list[str], pairs: dict) -> list[str]:
        times = [[name, *(milli(shape[kind][name]) for shape in shapes)] for name in names]
        rates = []
        for title, (over, under, key) in pairs.items():
            values = [shape[kind][over][key] / shape[kind][under][key] for shape in shapes]
            rates.append([title, *map(short, [*values, statistics.median(values)])])
        return [table(head, times), "How many times the first costs what the second costs:", "", table([*head, "median"], rates)]

    peer = "vector_quantize_pytorch"
    time = {f"{peer} / rotvq": (peer, "rotvq", "median_s"), "plain / rotvq": ("plain", "rotvq", "median_s"), "rotvq / product and argmax": ("rotvq", BARE, "median_s")}
    memory = {f"peak memory: rotvq / {peer}": ("rotvq", peer, "peak_bytes"), "peak memory: rotvq / plain": ("rotvq", "plain", "peak_bytes")}
    mebi = [[name, *(f"{shape['training'][name]['peak_bytes'] / 2**20:.0f}" for shape in shapes)] for name in ("rotvq", peer, "plain", BARE)]
    return "\n".join([QUANTIZER.format(device=device, **spread(timed)), "A training step:", "", *part("training", ["rotvq", peer, "plain", BARE], time | memory),
                      "Most memory held at one time in a training step, in MiB, the layer and its input not counted:", "", table(head, mebi),
                      "A lookup, in eval mode; `encode` returns the indices only:", "",
                      *part("lookup", ["rotvq", "rotvq, encode", peer, "plain", BARE], time | {"rotvq, encode / product and argmax": ("rotvq, encode", BARE, "median_s")}),
                      about(held), "",
                      f"![Time and peak memory of a training step against N, K and d; the other two are at N = 8192, d = 32, K = 1024. {about(held)}]"
                      f"(images/quantizer_{device}.png)", ""])


def draw_quantizer(held: dict) -> None:
    import matplotlib.pyplot as plt

    from rotvq import plots

    plots.style()
    fig, axes = plt.subplots(2, 3, figsize=(9, 4.6), sharex="col", sharey="row")
    shown = {"rotvq": plots.COLORS["rotation"], "vector_quantize_pytorch": "0.45", BARE: "0.75"}
    for column, (axis, shapes) in zip(axes.T, held["curves"].items()):
        x = [shape["shape"]["NdK".index(axis)] for shape in shapes]
        for name, color in shown.items():
            column[0].loglog(x, [1e3 * shape["training"][name]["median_s"] for shape in shapes], "o-", ms=3, color=color, label=name)
            column[1].loglog(x, [shape["training"][name]["peak_bytes"] / 2**20 for shape in shapes], "o-", ms=3, color=color)
        column[1].set(xlabel=axis, xscale="log")
        column[1].set_xticks(x, x, fontsize=7)
        column[1].minorticks_off()
    axes[0, 0].set_ylabel("ms"), axes[1, 0].set_ylabel("MiB")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    fig.savefig(ROOT / "nbs" / "images" / f"quantizer_{held['machine']['device']}.png")
    plt.close(fig)


def step(held: dict) -> str:
    "The section of one device."
    none = held["results"]["none"]["median_s"]
    rows = [[{"none": "no quantizer", "ste": "rotvq, straight-through", "rotation": "rotvq, rotation"}.get(name, name), milli(r),
             "" if name == "none" else f"{1 - none / r['median_s']:.1%}"] for name, r in held["results"].items()]
    return "\n".join([STEP.format(device=held["machine"]["device"], **held), table(["", "a step, ms", "share"], rows), about(held), ""])


def training(held: dict) -> str:
    "The section of one device."
    data, rows = held["data"], []
    for precision, times in held["steps"].items():
        ours, theirs = (times[name]["pictures_per_second"] for name in ("rotation", "vector_quantize_pytorch"))
        rows.append([f"training step, {precision}", f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.1f}"])
    ours, theirs = (data[name]["pictures_per_second"] for name in ("rotvq", "ImageFolder and DataLoader"))
    rows.append(["batches, without a model", f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.1f}"])
    text = TRAINING.format(device=held["machine"]["device"], preset=held["preset"], decoding=data["decoding_once_s"], pictures=data["pictures"])
    return "\n".join([text, table(["pictures per second", "rotvq", "the other", "ratio"], rows), about(held), ""])


def traffic(held: dict) -> str:
    "Two tables: kernels, and bytes in multiples of z."
    def part(title: str, shapes: list[dict]) -> str:
        cell = lambda r: f"{r['kernels']}, {r['bytes']:.1f}" if r["bytes"] < 100 else f"{r['kernels']}, {r['bytes']:.0f}"
        rows = [[name, *(cell(shape["results"][name]) for shape in shapes)] for name in shapes[0]["results"]]
        return table([f"{title}: kernels, bytes / z", *(str(tuple(shape["shape"])) for shape in shapes)], rows)
    return "\n".join([TRAFFIC.format(torch=held["torch"]), part("(N, d)", held["estimators"]), TRAFFIC_LAYER, part("(N, d, K)", held["layers"]), ""])


SECTIONS = {"estimators": (estimators, draw), "quantizer": (quantizer, draw_quantizer), "step": (step, None), "training": (training, None)}


def in_short(results: dict) -> str:
    "The takeaway, in medians over the shapes."
    of_trick, of_layer, of_step, of_training = (results[kind] for kind in ("estimators", "quantizer", "step", "training"))
    middle = lambda values: statistics.median(values)
    layer = lambda over, under, key: middle([s["training"][over][key] / s["training"][under][key] for s in of_layer["shapes"]])
    peer = "vector_quantize_pytorch"
    trick, ste = middle(ratios(of_trick, "rotate_to", "rotvq")), middle(ratios(of_trick, "rotvq", "plain STE"))
    compiled = middle(ratios(of_trick, "rotvq, compiled", "rotate_to, compiled"))
    none = of_step["results"]["none"]["median_s"]
    share = lambda name: 1 - none / of_step["results"][name]["median_s"]
    whole = of_training["steps"]["float32"]
    faster = whole["rotation"]["pictures_per_second"] / whole[peer]["pictures_per_second"]
    return f"""
**In short** (a CPU with two cores, medians over the shapes below):

- A training step of the layer takes {1 / layer(peer, "rotvq", "median_s"):.0%} of the time and {layer("rotvq", peer, "peak_bytes"):.1%} of the memory of `{peer}`, and about as long as the bare product of vectors and codes.
- The rotation trick alone costs {ste:.1f} times plain straight-through, and {1 / trick:.0%} of `rotate_to`; where both are compiled, {compiled:.1f} times `rotate_to`.
- In a training step of a model the quantizer's share is {share("rotation"):.0%}, with `{peer}` {share(peer):.0%}; the whole step is {faster:.1f} times as fast.
- No GPU has run any of this yet: what is known of one is counted, not timed ([below](#traffic)).
"""


def page() -> tuple[str, list]:
    "The text, and what to draw."
    cpu = {kind: json.loads((RESULTS / f"{kind}_cpu.json").read_text(encoding="utf-8")) for kind in SECTIONS}
    text, figures = INTRO + in_short(cpu), []
    for kind, (write, figure) in SECTIONS.items():
        for file in sorted(RESULTS.glob(f"{kind}_*.json")):
            held = json.loads(file.read_text(encoding="utf-8"))
            text += write(held)
            if figure: figures.append((figure, held))
    counted = RESULTS / "traffic.json"
    return text + traffic(json.loads(counted.read_text(encoding="utf-8"))), figures


if __name__ == "__main__":
    text, figures = page()
    file = ROOT / "nbs" / "benchmarks.qmd"
    if "--check" in sys.argv: sys.exit(file.read_text(encoding="utf-8") != text and f"{file} differs from the results: run tools/benchmarks_page.py.")
    file.write_text(text, encoding="utf-8")
    for figure, held in figures: figure(held)
