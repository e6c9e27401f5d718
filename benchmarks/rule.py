"""What the weight of the rotation should count: ways to take it, in set-ups of benchmarks/when.py.

    python benchmarks/rule.py [--data DIR] [--part 0/2]

One seed and one rate, 2.7e-3; thirty epochs at 32 × 32, two to four minutes a run on one core. Each
run appends one line to nbs/results/rule.jsonl; what is there is not run again. Two processes share
the work with --part 0/2 and --part 1/2, each with OMP_NUM_THREADS=1.
"""

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from rotvq import rotation_until_used
from rotvq.layer.learning import NEVER_CHOSEN, Codebook, unused_within_reach
from rotvq.run.bench import trial
from rotvq.run.data import SAMPLE, ImageNet10, imagenet10
from rotvq.run.records import hardware
from when import ROOT, SETUPS, config_of

RESULTS = ROOT / "nbs" / "results" / "rule.jsonl"
RATE, SEED = 2.7e-3, 0


def unused(book: Codebook, factor: int = 160) -> Tensor:
    "Which codes none of the last `factor` K vectors chose."
    return book.idle >= (factor * len(book.idle) / book.counts.sum() - 0.5).clamp_min(1)


def share(book: Codebook) -> Tensor:
    return unused(book).float().mean()


def within(part: float, factor: int = 160) -> Callable[[Codebook], Tensor]:
    "The share of unused codes less than `part` as long as those in use are."

    def weight(book: Codebook) -> Tensor:
        idle, length = unused(book, factor), book().detach().norm(dim=1)
        long = torch.where(idle, 0, length).sum() / (~idle).sum()
        return (idle & ~(length >= part * long)).float().mean()

    return weight


WEIGHTS = {
    "share unused": share,
    "twice the share, at most 1": lambda book: (2 * share(book)).clamp_max(1),
    "all or nothing at 5 %": lambda book: (share(book) > 0.05).float(),
    "share never used": lambda book: (book.idle >= NEVER_CHOSEN // 2).float().mean(),
    "unused within reach": lambda book: unused_within_reach(book(), book.idle, book.counts.sum()),
    "unused, half as long": within(0.5),
    "within reach, after 40 K": within(0.25, 40),
    "within reach, after 1,280 K": within(0.25, 1280),
}
REACH, SHARE = "unused within reach", "share unused"
RUNS = [("K = 4,096", name) for name in list(WEIGHTS)[:5]]
RUNS += [
    ("learnable codebook, k-means start", name) for name in (SHARE, REACH, "unused, half as long")
]
RUNS += [
    ("plain", name)
    for name in (
        SHARE,
        REACH,
        "share never used",
        "within reach, after 40 K",
        "within reach, after 1,280 K",
    )
]


def run(setup: str, name: str, pictures) -> dict:
    "Train with the weight of that name, and look at it after every epoch."
    held, weights, weight = {}, [], WEIGHTS[name]

    def change(model) -> None:
        if SETUPS[setup].change:
            SETUPS[setup].change(model)
        held["book"] = model.quantizer.book

    def estimator(z, q):
        with torch.no_grad():
            w = weight(held["book"])
        weights.append(w)
        return rotation_until_used(z, q, w)

    done = trial(estimator, config_of(setup, RATE), SEED, pictures, change)
    row = {
        "setup": setup,
        "weight": name,
        "lr": RATE,
        "seed": SEED,
        "seconds": round(done.seconds, 1),
    }
    for key in "mse", "usage":
        row[key] = [float(f"{r[key]:.4g}") for r in done.rows]
    row["w"] = float(f"{torch.stack(weights[-20:]).mean():.3g}")  # at the end
    return row | {"machine": hardware(torch.device("cpu"))["name"]}


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument("--part", default="0/1", help="this process takes every n-th run: k/n")
    args = options.parse_args()
    source = imagenet10(args.data)
    if source == SAMPLE:
        raise SystemExit("This experiment needs ImageNet-10: name its folder with --data.")
    part, parts = map(int, args.part.split("/"))
    pictures = tuple(ImageNet10(split, 32, source).images for split in ("train", "val"))
    for setup, name in RUNS[part::parts]:
        lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
        if any((row["setup"], row["weight"]) == (setup, name) for row in map(json.loads, lines)):
            continue
        row = run(setup, name, pictures)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(setup, name, row["mse"][-1], row["usage"][-1], row["w"], row["seconds"], flush=True)


if __name__ == "__main__":
    main()
