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
table. Every run checks first that all candidates but straight-through compute the same gradients.
"""
ESTIMATORS = """
## The rotation trick, forward and backward {{#estimators-{device}}}

`python benchmarks/estimators.py` times the value and its gradient to `z` for N vectors of d numbers, float32, against plain straight-through
(`z + (q − z).detach()`), `rotate_to` of `vector_quantize_pytorch` 1.32, and the formula written as batched matrix products.
Median in milliseconds, quartiles in brackets; "compiled" is one graph by `torch.compile`.
"""
NAMES = ["rotvq", "rotvq, compiled", "plain STE", "plain STE, compiled", "rotate_to", "rotate_to, compiled", "batched matrices"]


def table(head: list[str], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(head), line(["---"] + ["---:"] * (len(head) - 1)), *map(line, rows)]) + "\n"


def ratios(held: dict, over: str, under: str, key: str = "median_s") -> list[float]:
    "How many times `over` costs what `under` costs, for each shape."
    return [shape["results"][over][key] / shape["results"][under][key] for shape in held["shapes"]]


def estimators(held: dict) -> str:
    "The section of one device."
    machine, shapes = held["machine"], held["shapes"]
    head = ["(N, d)", *(f"({n}, {d})" for n, d in (shape["shape"] for shape in shapes))]
    milli = lambda r: "{:.2f} ({:.2f} to {:.2f})".format(*(1e3 * t for t in (r["median_s"], *r["quartiles_s"])))
    times = [[name, *(milli(shape["results"][name]) for shape in shapes)] for name in NAMES]
    memory = [[name, *(f"{shape['results'][name]['peak_bytes'] / shape['input_bytes']:.1f}" for shape in shapes)] for name in NAMES]
    pairs = {"rotate_to / rotvq": ("rotate_to", "rotvq"), "rotate_to / rotvq, compiled": ("rotate_to", "rotvq, compiled"),
             "both compiled: rotate_to / rotvq": ("rotate_to, compiled", "rotvq, compiled"),
             "batched matrices / rotvq": ("batched matrices", "rotvq"), "rotvq / plain STE": ("rotvq", "plain STE"),
             "rotvq, compiled / plain STE": ("rotvq, compiled", "plain STE")}
    rates = [[name, *(f"{x:.1f}" for x in values), f"{statistics.median(values):.1f}"]
             for name, values in ((name, ratios(held, *pair)) for name, pair in pairs.items())]
    about = f"{machine['name']}, {machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}, {held['rounds']} rounds."
    return "\n".join([ESTIMATORS.format(device=machine["device"]), table(head, times), about, "",
                      "How many times the first costs what the second costs:", "", table([*head, "median"], rates),
                      "Most memory held at one time, in multiples of the size of `z`. The gradient is one; `rotvq` does not copy the value, `q`; below d = 8 it turns its blocks over, into buffers:", "",
                      table(head, memory), f"![Time of forward and backward, relative to plain straight-through, on a logarithmic axis. {about}]"
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
        ax.bar(x, ratios(held, name, "plain STE"), width=.13, color=color, label=name)
    ax.set_xticks(range(len(held["shapes"])), [f"({n}, {d})" for n, d in (shape["shape"] for shape in held["shapes"])])
    ax.set(yscale="log", ylabel="time / plain STE")
    fig.legend(loc="outside upper center", ncols=6, fontsize=8)
    fig.savefig(ROOT / "nbs" / "images" / f"estimators_{held['machine']['device']}.png")
    plt.close(fig)


def page() -> tuple[str, list[dict]]:
    held = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("estimators_*.json"))]
    return INTRO + "".join(map(estimators, held)), held


if __name__ == "__main__":
    text, held = page()
    file = ROOT / "nbs" / "benchmarks.qmd"
    if "--check" in sys.argv: sys.exit(file.read_text(encoding="utf-8") != text and f"{file} differs from the results: run tools/benchmarks_page.py.")
    file.write_text(text, encoding="utf-8")
    for each in held: draw(each)
