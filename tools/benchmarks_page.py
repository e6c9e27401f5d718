"""nbs/benchmarks.qmd and its figures from the results of benchmarks/*.py. `--check` only compares
the page."""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from measure import named

RESULTS = ROOT / "nbs" / "results"
INTRO = """---
title: "Benchmarks"
description: "What the estimators, the layer and a training step take beside others, measured side by side, on a CPU and on a GPU."
---

<!-- Made by tools/benchmarks_page.py from nbs/results/; edit there. -->

All candidates of a shape take turns in one run, so compare down a column; absolute times belong to the machine named below each
table. Every run checks first that the candidates compute the same: the estimators the same gradients (all but straight-through),
the layers the same indices.
"""
ESTIMATORS = """
## The rotation trick, forward and backward {{#estimators-cpu}}

`python benchmarks/estimators.py` times the value and its gradient to `z` for N vectors of d numbers, float32, against plain straight-through
(`z + (q − z).detach()`), `rotate_to` of `vector_quantize_pytorch` 1.32, and the formula written as batched matrix products.
Medians in milliseconds; "compiled" is one graph by `torch.compile`.
"""
QUANTIZER = """
## The layer {{#quantizer-cpu}}

`python benchmarks/quantizer.py` times a training step (forward, backward to `z`, and the update of the codebook) and a lookup, for N
vectors of d numbers, normally distributed, and K codes, float32, decay 0.8. (`rotvq` learns when it is told to, after the gradient; the others in their forward pass.) `vector_quantize_pytorch` 1.32 has the same settings, with the
rotation trick; "plain" is a layer written from the paper of the VQ-VAE with `torch.cdist` and a one-hot matrix. "Product and argmax" is the
product of all vectors with all codes, a tile of 2²⁰ scores at a time, and the `argmax` of each row: no gradient, no learning.
Medians in milliseconds.
"""
TRAFFIC = """
## What a GPU has to move {{#traffic}}

`python benchmarks/traffic.py` counts, with PyTorch {torch} and without a GPU: every operation that is no view is one kernel, which reads
its arguments and writes its results; an operator of `rotvq` counts as what a GPU runs for it. Bytes are multiples of those of `z` in float32. Operations
like these are limited by memory on a GPU, and by the launches where tensors are small. Of the kernels of [the GPU room](hardware/41_gpu.ipynb)
the memory that they are given is counted, each tensor once (the lookup reads the codes again for every 64 vectors, from the
second-level cache where they fit into it).

The rotation trick, forward and backward. The least that can be done is 4: read g, z and q, write the gradient.
"""
TRAFFIC_LAYER = """
A training step of the layer, with the same settings as above. For vectors of up to 64 numbers it is four kernels: lookup, codes, loss and sums in
one ([taken where that is the faster form](hardware/41_gpu.ipynb#which-form-by-measuring)), both gradients in another, and two that move the codebook. No GPU
has run them yet. For longer vectors the search writes scores, a tile at a time. `vector_quantize_pytorch` makes a one-hot matrix.
"""
STEP = """
## Share of a training step {{#step-cpu}}

`python benchmarks/step.py` times whole training steps of the VQ-VAE at a preset,
with several quantizers (the plain one is that of the table above) and with none, where the encoder output goes straight to the decoder. The share is what a step costs more
than that.
"""
TRAINING = """
## Pictures per second {{#training-cpu}}

`python benchmarks/training.py` times whole training steps at a preset with the rotation trick, and the same model around
`VectorQuantize` of `vector_quantize_pytorch` 1.32, or around the plain layer; and an epoch of batches without a model, ours against `ImageFolder` in a `DataLoader` with a
process for each core, which decodes every picture in every epoch. Ours decodes once and reads bytes from then on.
"""
STEPS = """
## Two hundred steps {{#steps-{slug}}}

`make gpu-check` takes {count} training steps of the preset `{preset}`, on one batch, one by one, [replayed as a graph](run/54_graphs.ipynb) (since the
last of the measurements below) and compiled, and looks where the time of the device goes. (`sum` has the gradients of the convolutions' biases, a sum
over all positions for each channel, and `add_` the addition of those biases, which PyTorch does after cuDNN's convolution.) The least is counted from shapes: what the operations of an eager step read and write, at the device's bandwidth. No step
was seen to wait for the device, after the tenth (`torch.cuda.set_sync_debug_mode("error")`).
"""
BARE = "product and argmax"
NAMES = [
    "rotvq",
    "rotvq, compiled",
    "plain STE",
    "plain STE, compiled",
    "rotate_to",
    "rotate_to, compiled",
    "batched matrices",
]


def table(head: list[str], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return (
        "\n".join([line(head), line(["---"] + ["---:"] * (len(head) - 1)), *map(line, rows)]) + "\n"
    )


def ratios(held: dict, over: str, under: str, key: str = "median_s") -> list[float]:
    "How many times `over` costs what `under` costs, for each shape."
    return [shape["results"][over][key] / shape["results"][under][key] for shape in held["shapes"]]


def about(held: dict, results: list[dict] | None = None) -> str:
    "The machine, how far quartiles lie from their median, and what else is to be known of a file."
    machine = held["machine"]
    kind = (
        f"{machine['name']}, {machine['device']}" if machine["device"] == "cpu" else machine["name"]
    )
    parts = [
        kind,
        f"{machine['threads']} threads",
        f"PyTorch {machine['torch']}",
        f"{held['rounds']} rounds",
    ]
    text = (
        ", ".join(
            [*parts, f"rotvq {held['version']} on {held['date']}"] if "version" in held else parts
        )
        + "."
    )
    if results:
        far = [max(abs(q / r["median_s"] - 1) for q in r["quartiles_s"]) for r in results]
        _, half, most = statistics.quantiles(far, n=4)
        text += (
            f" Quartiles within {half:.1%} of the median in half of the rows, within {most:.0%} in"
            " three of four."
        )
    return text + (f" {held['note']}" if "note" in held else "")


WIDEST = 0.5  # a quartile from its median; what is above was disturbed


def refuse_disturbed(file: str, held) -> None:
    "Raise where a row of results was measured while the machine did something else."
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()
    for part in parts:
        refuse_disturbed(file, part)
    if not isinstance(held, dict) or "quartiles_s" not in held:
        return
    far = max(abs(q / held["median_s"] - 1) for q in held["quartiles_s"])
    if far > WIDEST:
        raise SystemExit(
            f"{file}: a quartile lies {far:.0%} from its median of {1e3 * held['median_s']:.2f} ms."
            " Measure it again on a machine that does nothing else."
        )


def opening(description: str, kind: str, held: dict) -> str:
    "The description where a kind is shown first, for the CPU, and a heading for each GPU."
    name = held["machine"]["name"]
    return (
        description.format(**held)
        if named(held["machine"]) == "cpu"
        else f"\n### The same on an {name} {{#{kind}-{named(held['machine'])}}}\n"
    )


def estimators(held: dict) -> str:
    "The section of one device."
    shapes, timed = (
        held["shapes"],
        [r for shape in held["shapes"] for r in shape["results"].values()],
    )
    head = ["(N, d)", *(f"({n}, {d})" for n, d in (shape["shape"] for shape in shapes))]
    milli = lambda r: f"{1e3 * r['median_s']:.2f}"
    times = [[name, *(milli(shape["results"][name]) for shape in shapes)] for name in NAMES]
    memory = [
        [
            name,
            *(
                f"{shape['results'][name]['peak_bytes'] / shape['input_bytes']:.1f}"
                for shape in shapes
            ),
        ]
        for name in NAMES
    ]
    pairs = {
        "rotate_to / rotvq": ("rotate_to", "rotvq"),
        "rotate_to / rotvq, compiled": ("rotate_to", "rotvq, compiled"),
        "both compiled: rotate_to / rotvq": ("rotate_to, compiled", "rotvq, compiled"),
        "batched matrices / rotvq": ("batched matrices", "rotvq"),
        "rotvq / plain STE": ("rotvq", "plain STE"),
        "rotvq, compiled / plain STE": ("rotvq, compiled", "plain STE"),
    }
    rates = [
        [name, *(f"{x:.1f}" for x in values), f"{statistics.median(values):.1f}"]
        for name, values in ((name, ratios(held, *pair)) for name, pair in pairs.items())
    ]
    held_most = (
        "Most memory held at one time, in multiples of the size of `z`. The gradient is one; in"
        " `rotvq` up to 0.0.3, as measured here, the value was `q` itself (it is a copy since, one"
        " more)"
    )
    held_most += (
        "; what it makes on the way belongs to one block of rows:"
        if named(held["machine"]) == "cpu"
        else ":"
    )
    return "\n".join(
        [
            opening(ESTIMATORS, "estimators", held),
            (
                "![Time of forward and backward, relative to plain straight-through, on a"
                " logarithmic axis; thin lines from quartile to quartile."
                f" {held['machine']['name']}.](images/estimators_{named(held['machine'])}.png)"
            ),
            "",
            table(head, times),
            about(held, timed),
            "",
            "How many times the first costs what the second costs:",
            "",
            table([*head, "median"], rates),
            held_most,
            "",
            table(head, memory),
        ]
    )


def plain_numbers(ax) -> None:
    "Ticks at 1, 2, 5, 10 ... of a logarithmic axis, without powers."
    from matplotlib.ticker import LogLocator

    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        set_formatter("{x:g}")


def draw(held: dict) -> None:
    import matplotlib.pyplot as plt

    from rotvq import plots

    plots.style()
    fig, ax = plt.subplots(figsize=(8, 3.4))
    shown = {
        "plain STE": plots.COLORS["ste"],
        "rotvq, compiled": "#56B4E9",
        "rotvq": plots.COLORS["rotation"],
        "rotate_to, compiled": "0.75",
        "rotate_to": "0.45",
        "batched matrices": "0.2",
    }
    for i, (name, color) in enumerate(shown.items()):
        x = [k + (i - 2.5) * 0.14 for k in range(len(held["shapes"]))]
        heights, results = (
            ratios(held, name, "plain STE"),
            [shape["results"][name] for shape in held["shapes"]],
        )
        ends = [
            [abs(r["quartiles_s"][k] / r["median_s"] - 1) * h for h, r in zip(heights, results)]
            for k in (0, 1)
        ]
        ax.bar(x, heights, width=0.13, color=color, label=name, yerr=ends, error_kw={"lw": 0.8})
    ax.set_xticks(
        range(len(held["shapes"])),
        [f"({n}, {d})" for n, d in (shape["shape"] for shape in held["shapes"])],
    )
    ax.set(yscale="log", ylabel="time / plain STE")
    plain_numbers(ax)
    fig.legend(loc="outside upper center", ncols=6, fontsize=8)
    fig.savefig(ROOT / "nbs" / "images" / f"estimators_{named(held['machine'])}.png")
    plt.close(fig)


def milli(r: dict) -> str:
    return f"{1e3 * r['median_s']:.{1 if r['median_s'] > 0.01 else 2}f}"


def short(x: float) -> str:
    return f"{x:.3f}" if x < 0.1 else f"{x:.2f}" if x < 2 else f"{x:.1f}"


def quantizer(held: dict) -> str:
    "The section of one device."
    shapes = held["shapes"]
    head = ["(N, d, K)", *("({}, {}, {})".format(*shape["shape"]) for shape in shapes)]
    timed = [
        r
        for shape in shapes
        for kind in ("training", "lookup")
        for r in shape[kind].values()
        if "quartiles_s" in r
    ]

    def part(kind: str, names: list[str], pairs: dict) -> list[str]:
        times = [[name, *(milli(shape[kind][name]) for shape in shapes)] for name in names]
        rates = []
        for title, (over, under, key) in pairs.items():
            values = [shape[kind][over][key] / shape[kind][under][key] for shape in shapes]
            rates.append([title, *map(short, [*values, statistics.median(values)])])
        return [
            table(head, times),
            "How many times the first costs what the second costs:",
            "",
            table([*head, "median"], rates),
        ]

    peer = "vector_quantize_pytorch"
    time = {
        f"{peer} / rotvq": (peer, "rotvq", "median_s"),
        "plain / rotvq": ("plain", "rotvq", "median_s"),
        "rotvq / product and argmax": ("rotvq", BARE, "median_s"),
    }
    memory = {
        f"peak memory: rotvq / {peer}": ("rotvq", peer, "peak_bytes"),
        "peak memory: rotvq / plain": ("rotvq", "plain", "peak_bytes"),
    }
    mebi = [
        [name, *(f"{shape['training'][name]['peak_bytes'] / 2**20:.0f}" for shape in shapes)]
        for name in ("rotvq", peer, "plain", BARE)
    ]
    return "\n".join(
        [
            opening(QUANTIZER, "quantizer", held),
            *(
                [
                    (
                        "![Time and peak memory of a training step against N, K and d; the other"
                        f" two are at N = 8192, d = 32, K = 1024. {held['machine']['name']}.]"
                        f"(images/quantizer_{named(held['machine'])}.png)"
                    ),
                    "",
                ]
                if held["curves"]
                else []
            ),
            "A training step:",
            "",
            *part("training", ["rotvq", peer, "plain", BARE], time | memory),
            (
                "Most memory held at one time in a training step, in MiB, the layer and its input"
                " not counted:"
            ),
            "",
            table(head, mebi),
            "A lookup, in eval mode; `encode` returns the indices only:",
            "",
            *part(
                "lookup",
                ["rotvq", "rotvq, encode", peer, "plain", BARE],
                time | {"rotvq, encode / product and argmax": ("rotvq, encode", BARE, "median_s")},
            ),
            about(held, timed),
            "",
        ]
    )


def draw_quantizer(held: dict) -> None:
    import matplotlib.pyplot as plt

    from rotvq import plots

    plots.style()
    fig, axes = plt.subplots(2, 3, figsize=(9, 4.6), sharex="col", sharey="row")
    shown = {
        "rotvq": plots.COLORS["rotation"],
        "vector_quantize_pytorch": "0.45",
        "plain": plots.COLORS["ste"],
        BARE: "0.75",
    }
    for column, (axis, shapes) in zip(axes.T, held["curves"].items()):
        x = [shape["shape"]["NdK".index(axis)] for shape in shapes]
        for name, color in shown.items():
            if name not in shapes[0]["training"]:
                continue  # a file from before it was measured
            column[0].loglog(
                x,
                [1e3 * shape["training"][name]["median_s"] for shape in shapes],
                "o-",
                ms=3,
                color=color,
                label=name,
            )
            column[1].loglog(
                x,
                [shape["training"][name]["peak_bytes"] / 2**20 for shape in shapes],
                "o-",
                ms=3,
                color=color,
            )
        column[1].set(xlabel=axis, xscale="log")
        column[1].set_xticks(x, x, fontsize=7)
        column[1].xaxis.minorticks_off()
        for ax in column:
            plain_numbers(ax)
    axes[0, 0].set_ylabel("ms"), axes[1, 0].set_ylabel("MiB")
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8
    )
    fig.savefig(ROOT / "nbs" / "images" / f"quantizer_{named(held['machine'])}.png")
    plt.close(fig)


def step(held: dict) -> str:
    "The section of one device."
    none = held["results"]["none"]["median_s"]
    rows = [
        [
            {
                "none": "no quantizer",
                "ste": "rotvq, straight-through",
                "rotation": "rotvq, rotation",
                "plain": "a plain layer of ten lines",
            }.get(name, name),
            milli(r),
            "" if name == "none" else f"{1 - none / r['median_s']:.1%}",
        ]
        for name, r in held["results"].items()
    ]
    where = "Preset `{}` (N = {}, d = {}, K = {}):".format(held["preset"], *held["shape"])
    return "\n".join(
        [
            opening(STEP, "step", held),
            where,
            "",
            table(["", "a step, ms", "share"], rows),
            about(held, list(held["results"].values())),
            "",
        ]
    )


def steps(held: dict) -> str:
    "The section of one GPU: two hundred steps, and where the time of one goes."
    rows = [
        [
            title,
            f"{1e3 * held[key]['seconds a step']:.1f}",
            f"{held[key]['pictures a second']:,.0f}",
            f"{held[key]['peak bytes'] / 2**20:,.0f}",
            f"{held[key]['planned bytes'] / 2**20:,.0f}",
        ]
        for key, title in (
            ("eager", "as it is"),
            ("replayed", "replayed as a graph"),
            ("compiled", "compiled"),
        )
        if key in held
    ]
    profile, machine = held["profile"], held["machine"]
    shown = [
        [f"`{row['name']}`", f"{row['ms_a_step']:.2f}", f"{row['calls_a_step']:.0f}"]
        for row in profile["rows"]
    ]
    least = held["eager"]["least seconds"]  # None for a GPU whose rates are not known
    text = f"The least that is counted is {1e3 * least:.1f} ms. " if least else ""
    text += (
        f"In an eager step the device is busy for {profile['device_ms_a_step']:.1f} ms, by the"
        " profiler, with these operators before all others:"
    )
    end = (
        f"{machine['name']}, PyTorch {machine['torch']}"
        + (f", rotvq {held['version']} on {held['date']}." if "version" in held else ".")
        + f" {held.get('note', '')}"
    )
    return "\n".join(
        [
            STEPS.format(slug=named(machine), **held),
            table(["", "a step, ms", "pictures a second", "MiB at most", "planned MiB"], rows),
            text,
            "",
            table(["operator", "ms a step", "calls"], shown),
            end,
            "",
        ]
    )


def training(held: dict) -> str:
    "The section of one device."
    data, rows = held["data"], []
    for precision, times in held["steps"].items():
        ours, theirs, plain = (
            times[name]["pictures_per_second"]
            for name in ("rotation", "vector_quantize_pytorch", "plain")
        )
        rows.append(
            [
                f"training step, {precision}",
                f"{ours:.0f}",
                f"{theirs:.0f}",
                f"{ours / theirs:.1f}",
                f"{plain:.0f}",
            ]
        )
    ours, theirs = (
        data[name]["pictures_per_second"] for name in ("rotvq", "ImageFolder and DataLoader")
    )
    rows.append(
        ["batches, without a model", f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.1f}", ""]
    )
    where = (
        f"Preset `{held['preset']}`; decoding took {data['decoding_once_s']:.0f} s, once, for"
        f" {data['pictures']:,} pictures."
    )
    return "\n".join(
        [
            opening(TRAINING, "training", held),
            where,
            "",
            table(["pictures per second", "rotvq", "the other", "ratio", "a plain layer"], rows),
            about(held),
            "",
        ]
    )


def traffic(held: dict) -> str:
    "Two tables: kernels, and bytes in multiples of z."

    def part(title: str, shapes: list[dict]) -> str:
        cell = lambda r: (
            f"{r['kernels']}, {r['bytes']:.1f}"
            if r["bytes"] < 100
            else f"{r['kernels']}, {r['bytes']:.0f}"
        )
        rows = [
            [name, *(cell(shape["results"][name]) for shape in shapes)]
            for name in shapes[0]["results"]
        ]
        return table(
            [f"{title}: kernels, bytes / z", *(str(tuple(shape["shape"])) for shape in shapes)],
            rows,
        )

    return "\n".join(
        [
            TRAFFIC.format(torch=held["torch"]),
            part("(N, d)", held["estimators"]),
            TRAFFIC_LAYER,
            part("(N, d, K)", held["layers"]),
            "",
        ]
    )


SECTIONS = {
    "estimators": (estimators, draw),
    "quantizer": (quantizer, draw_quantizer),
    "step": (step, None),
    "training": (training, None),
    "steps": (steps, None),
}
ON_CPUS = [kind for kind in SECTIONS if kind != "steps"]


def in_short(results: dict) -> str:
    "The takeaway, in medians over the shapes."
    of_trick, of_layer, of_step, of_training = (
        results[kind] for kind in ("estimators", "quantizer", "step", "training")
    )
    middle = lambda values: statistics.median(values)
    layer = lambda over, under, key: middle(
        [s["training"][over][key] / s["training"][under][key] for s in of_layer["shapes"]]
    )
    peer = "vector_quantize_pytorch"
    trick, ste = (
        middle(ratios(of_trick, "rotate_to", "rotvq")),
        middle(ratios(of_trick, "rotvq", "plain STE")),
    )
    compiled = middle(ratios(of_trick, "rotvq, compiled", "rotate_to, compiled"))
    none = of_step["results"]["none"]["median_s"]
    share = lambda name: 1 - none / of_step["results"][name]["median_s"]
    whole = of_training["steps"]["float32"]
    faster = whole["rotation"]["pictures_per_second"] / whole[peer]["pictures_per_second"]
    return f"""
**In short** (a CPU with two cores, medians over the shapes below):

- A training step of the layer takes {1 / layer(peer, "rotvq", "median_s"):.0%} of the time and {layer("rotvq", peer, "peak_bytes"):.1%} of the memory of `{peer}`, and {layer("rotvq", BARE, "median_s"):.1f} times as long as the scores of all codes and their largest.
- The rotation trick alone costs {ste:.1f} times plain straight-through, and {1 / trick:.0%} of `rotate_to`; where both are compiled, {compiled:.1f} times `rotate_to`.
- In a training step of a model the quantizer's share is {share("rotation"):.0%}, with `{peer}` {share(peer):.0%}; the whole step is {faster:.1f} times as fast.
"""


def in_short_on(gpu: dict) -> str:
    "The same of a GPU: as it is, not as it should be."
    name, slug = gpu["quantizer"]["machine"]["name"], named(gpu["quantizer"]["machine"])
    shapes, peer = gpu["quantizer"]["shapes"], "vector_quantize_pytorch"
    layer = lambda over, under, key="median_s": [
        s["training"][over][key] / s["training"][under][key] for s in shapes
    ]
    span = lambda values, show=short: f"{show(min(values))} to {show(max(values))}"
    one = "{:.1f}".format
    found = {
        tuple(row["shape"]): row["seconds"]["kernel"] / row["seconds"]["addmm and argmax"]
        for row in gpu["kernels"]["search"]
        if "kernel" in row["seconds"]
    }
    slower, about_equal = (
        [x for (_, d, _), x in found.items() if (d >= 32) == long] for long in (True, False)
    )
    share = [
        row["share_of_copy"]
        for row in gpu["kernels"]["gradient"]
        if row["share_of_copy"] and row["shape"][0] * row["shape"][1] > 2**24
    ]
    both = layer("plain", "rotvq")
    step, none = gpu["steps"], gpu["step"]["results"]
    least = (
        f", and the least that is counted is {1e3 * step['eager']['least seconds']:.1f}"
        if step["eager"]["least seconds"]
        else ""
    )
    milliseconds = lambda name: f"{1e3 * none[name]['median_s']:.1f}"
    return f"""
**On an {name}** ([PyTorch {gpu["quantizer"]["machine"]["torch"]}](#quantizer-{slug})) the layer is about as fast as the other library's, and slower than a plain one:

- A training step of the layer takes {span(layer("rotvq", peer))} of the time of `{peer}` at the four shapes, with {span(layer("rotvq", peer, "peak_bytes"))} of its memory. A plain layer with straight-through, of ten lines, takes {span(both)} of ours: it is {span([1 / x for x in both], one)} times as fast.
- The gradient's kernel moves its bytes at {span(share)} of the rate of a copy, for 2²⁵ numbers and more{", the launch included" if "note" in gpu["kernels"] else ""}. The search kernel takes {span(slower, one)} times as long as `addmm` and `argmax` for vectors of 32 numbers and more, and {span(about_equal, one)} times for shorter ones; it is chosen for up to 16 numbers ([where this is measured](hardware/41_gpu.ipynb#on-a-gpu)).
- A training step at the preset `cuda` takes {1e3 * step["eager"]["seconds a step"]:.1f} ms, {1e3 * step["compiled"]["seconds a step"]:.1f} compiled; in an eager one the device is busy for {step["profile"]["device_ms_a_step"]:.1f}{least}. Side by side: {milliseconds("none")} ms without a quantizer, {milliseconds("rotation")} with ours, {milliseconds(peer)} with `{peer}`.
"""


def of_machine(name: str, kinds) -> dict:
    return {
        kind: json.loads((RESULTS / f"{kind}_{name}.json").read_text(encoding="utf-8"))
        for kind in kinds
    }


def page() -> tuple[str, list]:
    "The text, and what to draw."
    text, figures = INTRO + in_short(of_machine("cpu", ON_CPUS)), []
    for file in sorted(RESULTS.glob("kernels_*.json")):
        name, kinds = file.stem.removeprefix("kernels_"), ("quantizer", "step", "kernels", "steps")
        if all((RESULTS / f"{kind}_{name}.json").exists() for kind in kinds):
            text += in_short_on(of_machine(name, kinds))
    for kind, (write, figure) in SECTIONS.items():
        for file in sorted(RESULTS.glob(f"{kind}_*.json")):
            held = json.loads(file.read_text(encoding="utf-8"))
            refuse_disturbed(file.name, held)
            text += write(held)
            if figure and held.get("curves", True):
                figures.append((figure, held))
    counted = RESULTS / "traffic.json"
    return text + traffic(json.loads(counted.read_text(encoding="utf-8"))), figures


if __name__ == "__main__":
    text, figures = page()
    file = ROOT / "nbs" / "benchmarks.qmd"
    if "--check" in sys.argv:
        sys.exit(
            file.read_text(encoding="utf-8") != text
            and f"{file} differs from the results: run tools/benchmarks_page.py."
        )
    file.write_text(text, encoding="utf-8")
    for figure, held in figures:
        figure(held)
