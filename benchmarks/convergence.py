"""The preset cpu to its end: straight-through, rotation, and rotation followed by straight-through,
over seeds and schedules.

    python benchmarks/convergence.py [--data DIR] [--seeds 0 1 2] [--preset cuda]

45 epochs each, at a constant learning rate of 3e-4 and with one epoch of warm-up and a cosine from
1e-3, under bfloat16 autocast (twice as fast as float32 on a CPU with matrix units, and slower on
others). Each run is resumed where it was stopped, and two processes can share the work (--settings
constant in one, cosine in the other, each with OMP_NUM_THREADS=1). What is finished goes into
nbs/results/imagenet10_convergence.json, one entry for each model with its curves; the runs of the
preset cuda into a file with the name of the GPU. --collect also takes runs that were stopped, with
the epochs they have. About forty minutes of one core for a setting and seed; 64 of the 100 epochs
of a seed of the preset cuda took an H200 five and a half minutes.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
from PIL import Image

from measure import machine, named
from rotvq.cli import in_full
from rotvq.layer.processes import best_device
from rotvq.layer.quantizer import title_of
from rotvq.run.data import SAMPLE, ImageNet10, Source, decode_picture, imagenet10, list_pictures
from rotvq.run.model import VQVAE
from rotvq.run.records import write_atomically
from rotvq.run.report import draw_maps, save_rows
from rotvq.run.training import PRESETS, to_float, train

ROOT = Path(__file__).resolve().parent.parent
ESTIMATORS = ("ste", "rotation", "rotation-then-ste")
BASE = dataclasses.replace(PRESETS["cpu"], epochs=45, precision="bfloat16")
SETTINGS = {
    "constant": BASE,
    "cosine": dataclasses.replace(BASE, lr=1e-3, warmup=1.0, schedule="cosine"),
}
PRESET_SETTINGS = {"cpu": SETTINGS, "cuda": {"cuda": PRESETS["cuda"]}}
CURVES = ("mse", "quantization_error", "relative_error", "usage", "perplexity", "train_mse")


def entries(setting: str, seed: int, folder: Path, held: ImageNet10) -> list[dict]:
    """What a run has measured: for each model its curves, one number an epoch, and of the last one
    all metrics that can be had."""
    rows = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    found = []
    for name in ESTIMATORS:
        mine = sorted(
            (row for row in rows if row["estimator"] == name), key=lambda row: row["epoch"]
        )
        curves = {key: [float(f"{row[key]:.5g}") for row in mine] for key in CURVES}
        model = VQVAE.from_pretrained(folder / name).to(best_device())
        full = {
            key: None if math.isnan(value) else float(f"{value:.5g}")
            for key, value in in_full(model, held).items()
        }
        tokens = (held.size // 2 ** model.config["downsamples"]) ** 2
        full["bits"] = round(
            tokens * math.log2(mine[-1]["perplexity"]), 1
        )  # of an ideal code for the symbols, one by one
        found.append(
            {
                "setting": setting,
                "seed": seed,
                "estimator": name,
                "pictures": mine[-1]["images"],
                "seconds": mine[-1]["seconds"],
                "machine": about["machine"]["name"],
                "torch": about["machine"]["torch"],
                "end": full,
            }
            | curves
        )
    return found


def draw(folder: Path, size: int = 128) -> None:
    """The bundled photographs through the models of a run, and the maps of their codebooks, into
    nbs/images/."""
    draw_maps(folder, ESTIMATORS).savefig(ROOT / "nbs" / "images" / "codebooks.png", dpi=110)
    photos = [p for split in ("val", "train") for p in list_pictures(SAMPLE.root, split)[0]]
    x = to_float(torch.stack([torch.tensor(decode_picture(p, size)) for p in photos]))
    with torch.no_grad():
        rows = {
            title_of(name): VQVAE.from_pretrained(folder / name)(x).x_hat for name in ESTIMATORS
        }
    sheet = folder / "photographs.png"
    save_rows({"original": x} | rows, sheet)
    # a sixth of the bytes, for a page that is to open at once
    small = ROOT / "nbs" / "images" / "reconstructions.webp"
    Image.open(sheet).save(small, quality=90, method=6)


def epochs_of(folder: Path) -> float:
    "How many epochs a run has, of all its models."
    file = folder / "metrics.jsonl"
    return (
        len(file.read_text(encoding="utf-8").splitlines()) / len(ESTIMATORS) if file.exists() else 0
    )


def collected(results: Path) -> dict[tuple, dict]:
    models = json.loads(results.read_text(encoding="utf-8"))["models"] if results.exists() else []
    return {(m["setting"], m["seed"], m["estimator"]): m for m in models}


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument("--runs", type=Path, default=ROOT / "runs" / "convergence")
    options.add_argument(
        "--preset",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: one setting, that preset as it is",
    )
    options.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options.add_argument(
        "--settings",
        nargs="*",
        choices=sorted(SETTINGS),
        default=sorted(SETTINGS),
        help="of the preset cpu",
    )
    options.add_argument(
        "--again",
        action="store_true",
        help="also what the file has already; files are written anew",
    )
    options.add_argument("--collect", action="store_true", help="only gather what is finished")
    args = options.parse_args()
    device = best_device().type
    kind = "convergence" if args.preset == "cpu" else "full_" + named(machine(device))
    results = ROOT / "nbs" / "results" / f"imagenet10_{kind}.json"
    source = imagenet10(args.data)
    if source == SAMPLE:
        raise SystemExit("This experiment needs ImageNet-10: name its folder with --data.")
    for seed in args.seeds:
        for setting, config in PRESET_SETTINGS[args.preset].items():
            folder = args.runs / f"{setting}-seed{seed}"
            if setting in SETTINGS and setting not in args.settings:
                continue
            last = collected(results).get((setting, seed, ESTIMATORS[-1]), {"mse": []})
            if len(last["mse"]) == config.epochs and not args.again:
                continue
            if args.collect and epochs_of(folder) < 1:
                continue
            if epochs_of(folder) < config.epochs and not args.collect:
                train(
                    config,
                    ESTIMATORS,
                    Source(source.root, "imagenet10"),
                    folder,
                    seed,
                    resume="auto",
                )
            pictures = ImageNet10("val", config.size, source, config.limit)
            new = {
                (m["setting"], m["seed"], m["estimator"]): m
                for m in entries(setting, seed, folder, pictures)
            }
            held = collected(results) | new  # read anew: another process may have added to it
            if (setting, seed) == ("cosine", 0):
                draw(folder)
            settings = {
                name: dataclasses.asdict(c) for name, c in PRESET_SETTINGS[args.preset].items()
            }
            before = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
            write_atomically(
                results,
                json.dumps(
                    before | {"settings": settings, "models": [held[key] for key in sorted(held)]}
                )
                + "\n",
            )


if __name__ == "__main__":
    main()
