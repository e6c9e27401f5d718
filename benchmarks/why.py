"""What makes the rotation trick fill a codebook: one change at a time, at the preset study.

    python benchmarks/why.py [--data DIR] [--seeds 0 1 2] [--only NAME ...] [--part 0/2]

A run takes about half a minute of one core (10 epochs of ImageNet-10 at 32 × 32, bfloat16
autocast); four experiments are three times as long, and not watched. Each appends one line to
nbs/results/why.jsonl; what is there is not run again, so the script can be stopped at any moment.
Two processes share the work with --part 0/2 and --part 1/2, each with OMP_NUM_THREADS=1.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from rotvq.householder import unit
from rotvq.run.bench import Moment, gradient_at_z, length_only, trial, turn_only
from rotvq.run.data import SAMPLE, ImageNet10, imagenet10
from rotvq.run.model import VQVAE
from rotvq.run.records import hardware
from rotvq.run.training import PRESETS, Config
from rotvq.run.why import (
    Change,
    Norm,
    Pull,
    after_encoder,
    birth_angles,
    forces,
    half_placed,
    hold,
    shifted,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results" / "why.jsonl"
STUDY = dataclasses.replace(PRESETS["study"], precision="bfloat16")
LONG = dataclasses.replace(STUDY, epochs=30)
STEPS = 147  # in an epoch


def with_(**settings) -> Config:
    return dataclasses.replace(STUDY, **settings)


def commitment_from(step: int, beta: float) -> Change:
    "The change that gives the commitment loss another weight from a step on."

    def change(model: VQVAE) -> None:
        vq, seen = model.quantizer, 0

        def before(*_) -> None:
            nonlocal seen
            seen += vq.training
            if seen > step:
                vq.commitment = beta

        vq.register_forward_pre_hook(before)

    return change


PAIR = {"straight-through": "ste", "rotation": "rotation"}
EXPERIMENTS = {name: (estimator, STUDY, None) for name, estimator in PAIR.items()}
EXPERIMENTS |= {
    "turn only": (turn_only, STUDY, None),
    "length only": (length_only, STUDY, None),
    "reflection": ("reflection", STUDY, None),
    "reflection, lr / 3": ("reflection", with_(lr=1e-4), None),
    "reflection, k-means start": ("reflection", with_(init="kmeans"), None),
    "straight-through, pull 0.1": ("ste", STUDY, after_encoder(Pull(0.1))),
    "straight-through, pull 0.3": ("ste", STUDY, after_encoder(Pull(0.3))),
    "straight-through, pull 1": ("ste", STUDY, after_encoder(Pull(1.0))),
    "straight-through, β = 4": ("ste", with_(commitment=4.0), None),
    "straight-through, β = 1/4": ("ste", with_(commitment=0.25), None),
}
for title, config, change in (
    ("unused codes held", STUDY, hold),
    ("shifted by 3, held", STUDY, shifted(3.0)),
    ("‖z‖ = 1", STUDY, after_encoder(Norm(1.0))),
    ("cosine", with_(distance="cosine"), None),
    ("k-means start", with_(init="kmeans"), None),
    ("N(0, 1) start, held", with_(init="normal"), hold),
    ("lr / 3", with_(lr=1e-4), None),
    ("lr · 3", with_(lr=9e-4), None),
):
    EXPERIMENTS |= {
        f"{name}, {title}": (estimator, config, change) for name, estimator in PAIR.items()
    }


def after(*changes: Change | None) -> Change:
    "One change after another."

    def change(model: VQVAE) -> None:
        for part in filter(None, changes):
            part(model)

    return change


# where both keep a few codes from the plain start: with half of the codes placed by k-means there
# is something to lose or to win
for title, config, change in (
    ("as it is", STUDY, None),
    ("shifted by 3, held", STUDY, shifted(3.0)),
    ("‖z‖ = 1", STUDY, after_encoder(Norm(1.0))),
    ("cosine", with_(distance="cosine"), None),
):
    EXPERIMENTS |= {
        f"{name}, {title}, half placed": (estimator, config, after(half_placed, change))
        for name, estimator in PAIR.items()
    }
EXPERIMENTS |= {
    "straight-through, 30 epochs": ("ste", LONG, None),
    "rotation, 30 epochs": ("rotation", LONG, None),
    "rotation, then straight-through, 30 epochs": ("rotation-then-ste", LONG, None),
    "rotation, 30 epochs, β = 4 after five": ("rotation", LONG, commitment_from(5 * STEPS, 4.0)),
}


class Witness:
    """Means over the steps of each epoch of what decides about the size of z, and the births of
    codes."""

    def __init__(self, estimator, config: Config, per_epoch: int):
        self.estimator, self.config, self.per_epoch = estimator, config, per_epoch
        self.steps, self.angles, self.epochs = [], [], []

    def __call__(self, moment: Moment) -> None:
        mine = gradient_at_z(self.estimator, moment)
        cos = (unit(moment.z) * unit(moment.q)).sum(1).clamp(-1, 1)
        lam = moment.q.norm(dim=1) / moment.z.norm(dim=1)
        now = forces(self.estimator, moment, self.config.commitment)._asdict()
        now |= {
            "theta": cos.acos().mean().rad2deg(),
            "lam": lam.nanmedian(),
            "cos_g": (unit(mine) * unit(moment.g)).sum(1).mean(),
        }
        self.steps.append({key: value.item() for key, value in now.items()})
        self.angles.append(birth_angles(moment, unused=self.per_epoch))
        if len(self.steps) == self.per_epoch:
            self.end()

    def end(self) -> None:
        means = {
            key: float(f"{sum(step[key] for step in self.steps) / len(self.steps):.4g}")
            for key in self.steps[0]
        }
        angles = torch.cat(self.angles)
        means["births"] = len(angles)
        means["birth_angle"] = round(angles.median().item(), 1) if len(angles) else None
        self.epochs.append(means)
        self.steps, self.angles = [], []


def settings(name: str) -> dict:
    "What an experiment's config has other than the preset."
    preset, config = (dataclasses.asdict(c) for c in (PRESETS["study"], EXPERIMENTS[name][1]))
    return {key: value for key, value in config.items() if value != preset[key]}


def run(name: str, seed: int, pictures: tuple[Tensor, Tensor]) -> dict:
    estimator, config, change = EXPERIMENTS[name]
    witness = (
        Witness(estimator, config, len(pictures[0]) // config.batch)
        if config.epochs == STUDY.epochs
        else None
    )
    done = trial(estimator, config, seed, pictures, change, witness)
    keys = "mse", "usage", "perplexity", "relative_error"
    curves = {key: [float(f"{row[key]:.4g}") for row in done.rows] for key in keys}
    start = {"name": name, "seed": seed, "settings": settings(name)}
    return (
        start
        | {"seconds": round(done.seconds, 1)}
        | curves
        | ({"epochs": witness.epochs} if witness else {})
    )


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options.add_argument("--only", nargs="*", default=list(EXPERIMENTS))
    options.add_argument("--part", default="0/1", help="this process takes every n-th run: k/n")
    args = options.parse_args()
    source = imagenet10(args.data)
    if source == SAMPLE:
        raise SystemExit("This experiment needs ImageNet-10: name its folder with --data.")
    pictures = tuple(ImageNet10(split, STUDY.size, source).images for split in ("train", "val"))
    part, parts = map(int, args.part.split("/"))
    todo = [(name, seed) for seed in args.seeds for name in args.only][part::parts]
    for name, seed in todo:
        lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
        same = {"name": name, "seed": seed, "settings": settings(name)}
        if any(same.items() <= row.items() for row in map(json.loads, lines)):
            continue
        start = time.time()
        row = run(name, seed, pictures) | {"machine": hardware(torch.device("cpu"))["name"]}
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(
            f"{name:34} seed {seed}  MSE {row['mse'][-1]:.4f}  codes used {row['usage'][-1]:.1%} "
            f" {time.time() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
