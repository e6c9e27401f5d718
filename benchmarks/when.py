"""Straight-through against rotation, set-up by set-up, each at its best learning rate, for thirty epochs.

    python benchmarks/when.py [--data DIR] [--part 0/2]

Preset study (ImageNet-10 at 32 × 32) with bfloat16 autocast and a cosine schedule: about 80 seconds a run on one core. A pair of set-up
and estimator is tried on seed 0 at rates three times apart, from 3e-4 and 9e-4 on, until the best of them has a worse one on either side
(8.1e-3 is the highest: at 2.4e-2 the pairs that were tried came out worse, nearly all of them by far). The two best rates are run on seeds
1 and 2, the rate with the lowest mean is taken, and the main set-ups are run at it on seeds 3 and 4, and at 64 × 64. Each run appends one line
to nbs/results/when.jsonl; what is there is not run again, so the script can be stopped at any moment. Two processes share the work with
--part 0/2 and --part 1/2, each with OMP_NUM_THREADS=1. (The cosine lookup under straight-through has three runs more, at 8.1e-3: with
seeds 1 and 2 its best rate lay at the edge of what had been tried.)
"""
import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from rotvq.bench import trial
from rotvq.data import SAMPLE, ImageNet10, imagenet10
from rotvq.runs import hardware
from rotvq.training import PRESETS, Config
from rotvq.when import FSQ, SimVQ, learnable, quantized_by

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results" / "when.jsonl"
STUDY = dataclasses.replace(PRESETS["study"], epochs=30, schedule="cosine", precision="bfloat16")
RATES, HIGHEST, TUNING, SEEDS, MORE = (3e-4, 9e-4), 8.1e-3, 0, (1, 2), (3, 4)
BOTH = "ste", "rotation"


class SetUp(NamedTuple):
    "What is changed, and the estimators that are compared in it."

    settings: dict
    change: Callable | None = None
    estimators: tuple[str, ...] = BOTH


SIM = quantized_by(lambda vq: SimVQ(vq.dim, vq.codebook_size, vq.estimator, vq.commitment))
KMEANS, REVIVAL = {"init": "kmeans"}, {"revive_after": 50}
SETUPS = {
    "plain": SetUp({}, estimators=(*BOTH, "rotation-then-ste")),
    "k-means start": SetUp(KMEANS),
    "revival": SetUp(REVIVAL),
    "k-means start and revival": SetUp(KMEANS | REVIVAL),
    "cosine": SetUp({"distance": "cosine"}),
    "β = 1/4, decay 0.99": SetUp({"commitment": 0.25, "decay": 0.99}),
    "learnable codebook": SetUp({}, learnable),
    "learnable codebook, β = 1/4": SetUp({"commitment": 0.25}, learnable),
    "learnable codebook, k-means start": SetUp(KMEANS, learnable),
    "SimVQ": SetUp({}, SIM),
    "FSQ": SetUp({}, quantized_by(lambda vq: FSQ(vq.dim)), ("ste",)),
    "k-means start and revival, width 8": SetUp(KMEANS | REVIVAL | {"width": 8}, estimators=("ste",)),
    "FSQ, width 8": SetUp({"width": 8}, quantized_by(lambda vq: FSQ(vq.dim)), ("ste",)),
    "SimVQ, β = 1/4": SetUp({"commitment": 0.25}, SIM),
}
MAIN, LARGE = ("plain", "k-means start", "revival"), ", 64 × 64"


def config_of(name: str, lr: float) -> Config:
    size = {"size": 64} if name.endswith(LARGE) else {}
    return dataclasses.replace(STUDY, lr=lr, **SETUPS[name.removesuffix(LARGE)].settings, **size)


def key_of(name: str, estimator: str, lr: float, seed: int) -> dict:
    "What a run is known by: its config where it differs from the preset, too."
    preset, config = (dataclasses.asdict(c) for c in (PRESETS["study"], config_of(name, lr)))
    settings = {key: value for key, value in config.items() if value != preset[key]}
    return {"setup": name, "estimator": estimator, "lr": lr, "seed": seed, "settings": settings}


def read() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def by_rate(rows: list[dict], name: str, estimator: str) -> dict[float, dict[int, float]]:
    "Final errors of a pair, by seed; rates in the order of the tuning seed's."
    held: dict = {}
    for row in rows:
        if (row["setup"], row["estimator"]) == (name, estimator): held.setdefault(row["lr"], {})[row["seed"]] = row["mse"][-1]
    return dict(sorted(held.items(), key=lambda item: item[1][TUNING]))


def next_rate(rows: list[dict], name: str, estimator: str) -> float | None:
    "Three times beyond the best rate where no rate has been tried on that side; None where there are worse ones on both."
    tried = by_rate(rows, name, estimator)
    best = next(iter(tried))
    near = float(f"{3 * best:.2g}"), float(f"{best / 3:.2g}")
    return next((lr for lr in near if lr not in tried and lr <= HIGHEST), None)


def two_rates(rows: list[dict], name: str, estimator: str) -> list[float]: return list(by_rate(rows, name, estimator))[:2]


def best_rate(rows: list[dict], name: str, estimator: str) -> float:
    "Of those that three seeds were run at, that with the lowest mean."
    held = {lr: runs for lr, runs in by_rate(rows, name, estimator).items() if {TUNING, *SEEDS} <= runs.keys()}
    return min(held, key=lambda lr: sum(held[lr][seed] for seed in (TUNING, *SEEDS)))


def run(key: dict, source: str) -> dict:
    name, estimator, lr, seed, _ = key.values()
    config = config_of(name, lr)
    pictures = tuple(ImageNet10(split, config.size, source).images for split in ("train", "val"))
    done = trial(estimator, config, seed, pictures, SETUPS[name.removesuffix(LARGE)].change)
    names = "mse", "usage", "perplexity", "relative_error"
    curves = {key: [float(f"{row[key]:.4g}") for row in done.rows] for key in names}
    return key | {"seconds": round(done.seconds, 1)} | curves | {"machine": hardware(torch.device("cpu"))["name"]}


def once(name: str, estimator: str, lr: float, seed: int, source: str):
    "Run and record, unless that has been done."
    key = key_of(name, estimator, lr, seed)
    if any(key.items() <= row.items() for row in read()): return
    row = run(key, source)
    with open(RESULTS, "a", encoding="utf-8") as file: file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{name:34} {estimator:18} lr {lr:.0e}  seed {seed}  MSE {row['mse'][-1]:.4f}  codes used {row['usage'][-1]:.1%}  "
          f"{row['seconds']:.0f} s", flush=True)


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument("--part", default="0/1", help="this process takes every n-th pair of set-up and estimator: k/n")
    args = options.parse_args()
    source = imagenet10(args.data)
    if source == SAMPLE: raise SystemExit("This experiment needs ImageNet-10: name its folder with --data.")
    part, parts = map(int, args.part.split("/"))
    mine = [(name, estimator) for name, setup in SETUPS.items() for estimator in setup.estimators][part::parts]
    for pair in mine:
        for lr in RATES: once(*pair, lr, TUNING, source)
        while lr := next_rate(read(), *pair): once(*pair, lr, TUNING, source)
    for seed in SEEDS:
        for pair in mine:
            for lr in two_rates(read(), *pair): once(*pair, lr, seed, source)
    for seed in MORE:
        for pair in mine:
            if pair[0] in MAIN: once(*pair, best_rate(read(), *pair), seed, source)
    for seed in (TUNING, *SEEDS):
        for name, estimator in mine:
            if name in MAIN: once(name + LARGE, estimator, best_rate(read(), name, estimator), seed, source)


if __name__ == "__main__":
    main()
