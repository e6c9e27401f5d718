"""Codes that start with a count of 0 or 1, and unused codes revived by waiting or by a running
count, beside each other.

    python benchmarks/revival.py --data DIR [--seeds 0 1]

Preset study (ImageNet-10 at 32 × 32, K = 512, 4,096 vectors a batch, so that an even count is 8)
with bfloat16 autocast, 10 epochs; about half a minute a run on one core. Each run appends one line
to nbs/results/revival.jsonl; what is there is not run again, so the script can be stopped at any
moment.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from rotvq.run.bench import trial
from rotvq.run.data import SAMPLE, ImageNet10, imagenet10
from rotvq.run.model import VQVAE
from rotvq.run.records import hardware
from rotvq.run.training import PRESETS

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results" / "revival.jsonl"
STUDY = dataclasses.replace(PRESETS["study"], precision="bfloat16")


def with_options(**options):
    "The change that sets options of the quantizer, and begins its codebook anew with them."

    def change(model: VQVAE) -> None:
        for name, value in options.items():
            setattr(model.quantizer, name, value)
        model.quantizer.counts.fill_(model.quantizer.initial_count)

    return change


WAYS = {"counts from 1": {}, "counts from 0": {"initial_count": 0.0}}
WAYS |= {f"revive_after={n}": {"revive_after": n} for n in (5, 20, 50, 200)}
WAYS |= {f"revive_below={x}": {"revive_below": x} for x in (0.1, 0.5, 2.0)}


def run(way: str, estimator: str, seed: int, pictures) -> dict:
    done = trial(estimator, STUDY, seed, pictures, with_options(**WAYS[way]))
    curves = {
        key: [float(f"{row[key]:.4g}") for row in done.rows]
        for key in ("mse", "usage", "perplexity")
    }
    return curves | {
        "seconds": round(done.seconds, 1),
        "machine": hardware(torch.device("cpu"))["name"],
    }


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    args = options.parse_args()
    source = imagenet10(args.data)
    if source == SAMPLE:
        raise SystemExit("This experiment needs ImageNet-10: name its folder with --data.")
    pictures = tuple(ImageNet10(split, STUDY.size, source).images for split in ("train", "val"))
    for seed in args.seeds:
        for way in WAYS:
            for estimator in ("ste", "rotation"):
                key = {"way": way, "estimator": estimator, "seed": seed}
                lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
                if any(key.items() <= json.loads(line).items() for line in lines):
                    continue
                row = key | run(way, estimator, seed, pictures)
                with open(RESULTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{way:18} {estimator:9} seed {seed}  MSE {row['mse'][-1]:.4f}  codes used"
                    f" {row['usage'][-1]:.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
