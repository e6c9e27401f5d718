"""Pictures per second: our training step against the same model around vector_quantize_pytorch, our
data path against DataLoader.

    python benchmarks/training.py [--data DIR] [--preset cpu]

Side by side in one run, taking turns. The step is the whole step: forward, backward, clipping,
AdamW, the codebook. The data path is an epoch of batches as floats on the device, without a model:
`rotvq.run.training.batches` against torchvision's ImageFolder (open, decode, resize, crop, mirror)
in a DataLoader with as many workers as there are cores; the first reads bytes that were decoded
once, and that time is given too. Writes nbs/results/training_<device>.json and, from it,
nbs/benchmarks.qmd. About five minutes on two cores.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time

import torch
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from measure import in_turns, machine, save
from rotvq.run.data import SAMPLE, ImageNet10, imagenet10
from rotvq.run.training import PRESETS, batches, place
from step import learners


def steps(preset, device: torch.device, rounds: int) -> dict:
    "Pictures per second of the step with each quantizer."
    x = (
        torch.rand(
            preset.batch, 3, preset.size, preset.size, generator=torch.Generator().manual_seed(0)
        )
        * 2
        - 1
    )
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    made = {
        name: learner
        for name, learner in learners(preset, device).items()
        if name in ("rotation", "vector_quantize_pytorch", "plain")
    }
    times = in_turns(
        {name: lambda learner=learner: learner.step(x) for name, learner in made.items()},
        rounds,
        device.type,
        memory=False,
    )
    return {
        name: {"pictures_per_second": preset.batch / t["median_s"], **t}
        for name, t in times.items()
    }


def theirs(source, preset, device: torch.device):
    "An epoch of ImageFolder and DataLoader."
    change = transforms.Compose(
        [
            transforms.Resize(preset.size),
            transforms.CenterCrop(preset.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    held = datasets.ImageFolder(str(source.root / "train"), change)
    loader = DataLoader(
        held,
        preset.batch,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count(),
        pin_memory=device.type == "cuda",
    )
    return (x.to(device, non_blocking=True) for x, _ in loader)


def data_path(source, preset, device: torch.device, rounds: int, limit: int) -> dict:
    "Pictures per second of an epoch without a model; at most `limit` batches of it."
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("ROTVQ_CACHE")
        os.environ["ROTVQ_CACHE"] = cache
        began = time.perf_counter()
        images = place(ImageNet10("train", preset.size, source).images, device)
        decoding = time.perf_counter() - began
        calls = {
            "rotvq": lambda: batches(images, preset, 0, 0, device),
            "ImageFolder and DataLoader": lambda: theirs(source, preset, device),
        }
        seconds = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                began, count = time.perf_counter(), 0
                for x in call():
                    count += len(x)
                    if count >= limit * preset.batch:
                        break
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append((time.perf_counter() - began) / count)
        if before is None:
            del os.environ["ROTVQ_CACHE"]
        else:
            os.environ["ROTVQ_CACHE"] = before
    return {"decoding_once_s": decoding, "pictures": len(images)} | {
        name: {"pictures_per_second": 1 / statistics.median(s)} for name, s in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--data", help="see `rotvq train --help`")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    source, preset, device = imagenet10(args.data), PRESETS[args.preset], torch.device(args.device)
    if source == SAMPLE:
        raise SystemExit("This benchmark needs ImageNet-10: name its folder with --data.")
    found = {
        precision: steps(dataclasses.replace(preset, precision=precision), device, args.rounds)
        for precision in ("float32", "bfloat16")
    }
    paths = data_path(source, preset, device, 3, 60)
    for precision, times in found.items():
        print(
            precision,
            {name: f"{t['pictures_per_second']:.0f} pictures/s" for name, t in times.items()},
        )
    print(paths)
    save(
        {
            "machine": machine(args.device),
            "preset": args.preset,
            "rounds": args.rounds,
            "steps": found,
            "data": paths,
        },
        "training",
        args.out,
    )


if __name__ == "__main__":
    main()
