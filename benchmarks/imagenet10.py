"""The experiment of the chapter on the run: straight-through, rotation and reflection on
ImageNet-10, over seeds and codebook starts.

    python benchmarks/imagenet10.py [--data DIR] [--preset cpu] [--long]

Writes nbs/results/imagenet10_<preset>.json (a row for each epoch, estimator, seed and setting)
after every run, so it can be stopped and started again. With --long it makes one long run in
float32 instead (45 epochs), into nbs/results/imagenet10_<preset>_long.json.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from rotvq.layer.processes import best_device
from rotvq.run.data import SAMPLE, ImageNet10, Source, imagenet10, list_pictures
from rotvq.run.model import VQVAE
from rotvq.run.records import hardware, write_atomically
from rotvq.run.training import PRESETS, evaluate, train

ROOT = Path(__file__).resolve().parent.parent
WNIDS = (
    "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777"
    " n03888257".split()
)
# setting -> what differs from the preset, estimators, seeds
SETTINGS = {
    "uniform start": ({}, ("ste", "rotation", "reflection"), (0, 1, 2)),
    "k-means start": ({"init": "kmeans"}, ("ste", "rotation"), (0, 1, 2)),
    "normal start": ({"init": "normal"}, ("ste", "rotation"), (0, 1)),
    "decay 0.99": ({"decay": 0.99}, ("ste", "rotation"), (0, 1)),
}
# Who is ahead after five epochs need not be ahead at the end.
LONG = {"45 epochs": ({"epochs": 45}, ("ste", "rotation"), (0,))}


def measure(preset, source, runs: Path, results: Path, settings: dict) -> list[dict]:
    "Run every setting that `results` does not hold yet."
    about = {"preset": dataclasses.asdict(preset), "machine": hardware(best_device())}
    held = (
        json.loads(results.read_text(encoding="utf-8"))
        if results.exists()
        else {"preset": about["preset"], "rows": []}
    )
    if held["preset"] != about["preset"]:
        raise SystemExit(f"{results} holds runs of another preset; move it away to begin anew.")
    rows = held["rows"]
    done = {(row["setting"], row["seed"]) for row in rows}
    for setting, (changes, estimators, seeds) in settings.items():
        for seed in seeds:
            if (setting, seed) in done:
                continue
            out = runs / f"{setting.replace(' ', '-')}-seed{seed}"
            print(f"== {setting}, seed {seed}", flush=True)
            run = train(
                dataclasses.replace(preset, **changes), estimators, source, out, seed, resume="auto"
            )
            rows += [{"setting": setting, **row} for row in run.rows]
            results.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(
                results,
                json.dumps(about | {"pictures": run.config["pictures"], "rows": rows}, indent=1)
                + "\n",
            )
    return rows


def measure_again(rows: list[dict], preset, source, runs: Path, results: Path) -> None:
    "Evaluate the saved models anew, for figures that the rows of their last epoch do not have yet."
    images = ImageNet10("val", preset.size, source, preset.limit).images
    for row in rows:
        if row["epoch"] == preset.epochs and "relative_error" not in row:
            folder = (
                runs / f"{row['setting'].replace(' ', '-')}-seed{row['seed']}" / row["estimator"]
            )
            result = evaluate(VQVAE.from_pretrained(folder), images)
            if abs(result["mse"] / row["mse"] - 1) > 1e-3:
                raise SystemExit(f"{folder} is not the model of its row in {results}.")
            row["relative_error"] = result["relative_error"]
    held = json.loads(results.read_text(encoding="utf-8"))
    write_atomically(results, json.dumps(held | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument("--preset", choices=list(PRESETS), default="cpu")
    options.add_argument("--runs", type=Path, default=ROOT / "runs" / "imagenet10")
    options.add_argument(
        "--long", action="store_true", help="one long run, instead of many short ones"
    )
    args = options.parse_args()
    source = imagenet10(args.data)
    if source == SAMPLE:
        raise SystemExit("This experiment needs ImageNet-10: name its folder with --data.")
    if list_pictures(source.root, "val")[2] != WNIDS:
        raise SystemExit(f"{source.root} does not hold the ten classes of Imagenette.")
    source = Source(source.root, "imagenet10")  # whatever the folder is called
    preset, results = (
        PRESETS[args.preset],
        ROOT / "nbs" / "results" / f"imagenet10_{args.preset}.json",
    )
    of_long = results.with_name(f"{results.stem}_long.json")
    if args.long:
        measure(preset, source, args.runs, of_long, LONG)
    else:
        rows = measure(preset, source, args.runs, results, SETTINGS)
        measure_again(rows, preset, source, args.runs, results)
