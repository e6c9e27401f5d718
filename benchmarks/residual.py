"""Which gradient for a stack of levels with projections in each: three formulations, on pictures.

    python benchmarks/residual.py [--data DIR] [--part 0/2]

Preset study (ImageNet-10 at 32 × 32) for ten epochs with a cosine schedule and bfloat16 autocast,
four levels of 64 codes of 8 numbers: every gradient of `ResidualVQ` with `projection="each"`, and
`projection="shared"`, each at the best of three learning rates on seed 0, and then on seeds 1 to 3;
and deep stacks of eight levels without projections, with and without revival, at 2.7e-3 on seeds 0
to 2. Appends one line a run to nbs/results/residual.jsonl: error by epoch, and at the end the error
and the codes used, level by level, on the validation pictures. What is there is not run again.
About a minute a run.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from rotvq import ResidualVQ
from rotvq.layer.lookup import code_counts
from rotvq.run.bench import trial
from rotvq.run.data import ImageNet10, imagenet10
from rotvq.run.records import hardware
from rotvq.run.training import PRESETS, to_float
from rotvq.run.when import quantized_by

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results" / "residual.jsonl"
CONFIG = dataclasses.replace(PRESETS["study"], epochs=10, schedule="cosine", precision="bfloat16")
ESTIMATORS, SIZE = ("ste", "rotation", "rotation-until-used"), 64
RATES, MIDDLE = (9e-4, 2.7e-3, 8.1e-3), 2.7e-3
EACH = {"num_quantizers": 4, "codebook_dim": 8, "projection": "each", "revive_after": "auto"}
STACKS = {
    f"each, {gradient}": EACH | {"gradient": gradient}
    for gradient in ("held", "through", "levels", "direct")
}
STACKS |= {
    "shared": EACH | {"projection": "shared"},
    "eight levels": {"num_quantizers": 8},
    "eight levels, revival": {"num_quantizers": 8, "revive_after": "auto"},
}


def by_level(model, images: torch.Tensor) -> dict:
    "Of the validation pictures: error of the decoder with 1, 2, … levels, and codes used in each."
    model.eval()
    L = model.quantizer.num_quantizers
    errors, counts = torch.zeros(L), torch.zeros(L, SIZE)
    with torch.no_grad():
        for part in images.split(128):
            x = to_float(part)
            z = model.encoder(x)
            indices = model.quantizer.encode(z)
            for n in range(L):
                q = model.quantizer(z, num_quantizers=n + 1).q
                errors[n] += (model.decoder(q) - x).square().mean() * len(x) / len(images)
                counts[n] += code_counts(indices[..., n], SIZE)
    return {
        "mse_by_level": errors.tolist(),
        "usage_by_level": (counts > 0).float().mean(1).tolist(),
    }


def run(stack: str, estimator: str, seed: int, rate: float, pictures) -> dict:
    make = lambda vq: ResidualVQ(vq.dim, SIZE, channel_first=True, **STACKS[stack])
    done = trial(
        estimator, dataclasses.replace(CONFIG, lr=rate), seed, pictures, quantized_by(make)
    )
    found = {"mse": [row["mse"] for row in done.rows]} | by_level(done.model, pictures[1])
    rounded = {key: [float(f"{x:.4g}") for x in values] for key, values in found.items()}
    return (
        {
            "stack": stack,
            "estimator": estimator,
            "seed": seed,
            "lr": rate,
            "seconds": round(done.seconds, 1),
        }
        | rounded
        | {"machine": hardware(torch.device("cpu"))["name"]}
    )


def held() -> dict:
    "The runs that are there: their last error, by what was run."
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = map(json.loads, lines)
    return {
        (row["stack"], row["estimator"], row["seed"], row.get("lr", MIDDLE)): row["mse"][-1]
        for row in rows
    }


def jobs():
    "What is to be run, one after another: the rates on seed 0 decide what follows."
    pairs = [(stack, estimator) for stack in STACKS for estimator in ESTIMATORS]
    deep = [pair for pair in pairs if pair[0].startswith("eight")]
    for seed in (0, 1, 2):
        yield from ((*pair, seed, MIDDLE) for pair in deep)
    for pair in pairs:
        if pair in deep:
            continue
        yield from ((*pair, 0, rate) for rate in RATES)
        best = min(RATES, key=lambda rate: held()[(*pair, 0, rate)])
        yield from ((*pair, seed, best) for seed in (1, 2, 3))


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", help="see `rotvq train --help`")
    args = options.parse_args()
    source = imagenet10(args.data)
    pictures = tuple(ImageNet10(split, CONFIG.size, source).images for split in ("train", "val"))
    for job in jobs():
        if job in held():
            continue
        row = run(*job, pictures)
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(*job, row["mse"][-1], row["usage_by_level"], f"{row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
