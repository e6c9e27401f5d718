"""What the encoder outputs of trained models are like: their dimensions, what a lookup must cost,
what it costs.

    python benchmarks/clouds.py [--data DIR] [--part 0/2]

The plain set-up of benchmarks/when.py at 2.7e-3 (32 × 32, 512 codes, thirty epochs; two minutes a
run on one core), the rotation also at 8.1e-3, which is its best rate, measured by
`rotvq.run.why.cloud_of` on the validation pictures. Each run appends one line to
nbs/results/clouds.jsonl; what is there is not run again. Two processes share the work with --part
0/2 and --part 1/2, each with OMP_NUM_THREADS=1.
"""

import argparse
import json

import torch

from rotvq.run.bench import trial
from rotvq.run.data import SAMPLE, ImageNet10, imagenet10
from rotvq.run.records import hardware
from rotvq.run.training import to_float
from rotvq.run.why import cloud_of
from when import ROOT, config_of

RESULTS = ROOT / "nbs" / "results" / "clouds.jsonl"
ESTIMATORS, SEEDS, RATE = (
    ("ste", "rotation", "rotation-then-ste", "rotation-until-used"),
    (0, 1, 2),
    2.7e-3,
)
RUNS = [(estimator, RATE) for estimator in ESTIMATORS] + [("rotation", 8.1e-3)]


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
    pictures = tuple(
        ImageNet10(split, config_of("plain", RATE).size, source).images
        for split in ("train", "val")
    )
    part, parts = map(int, args.part.split("/"))
    for estimator, lr, seed in [(*one, seed) for seed in SEEDS for one in RUNS][part::parts]:
        lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
        key = {"estimator": estimator, "lr": lr, "seed": seed}
        if any(key.items() <= json.loads(line).items() for line in lines):
            continue
        done = trial(estimator, config_of("plain", lr), seed, pictures)
        cloud = {
            name: float(f"{value:.4g}")
            for name, value in cloud_of(done.model, to_float(pictures[1]))._asdict().items()
        }
        row = (
            key
            | {"usage": done.rows[-1]["usage"]}
            | cloud
            | {"seconds": round(done.seconds, 1), "machine": hardware(torch.device("cpu"))["name"]}
        )
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
