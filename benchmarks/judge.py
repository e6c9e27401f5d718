"""Trains the classifier that comes with the package: rotvq/judge/model.safetensors, and beside it
what it was trained on.

    python benchmarks/judge.py [--data DIR]

Twenty epochs on ImageNet-10 at 64 × 64: random crops and mirror images, label smoothing, one cycle
of the learning rate. The weights are stored in float16. About ten minutes on two cores.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from rotvq.layer.processes import best_device
from rotvq.run.data import SAMPLE, ImageNet10, decode_picture, imagenet10, list_pictures
from rotvq.run.metrics import Judge
from rotvq.run.records import data_fingerprint, hardware
from rotvq.run.training import to_float

OUT = Path(__file__).resolve().parent.parent / "rotvq" / "judge"


def varied(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    "The batch moved by up to eight pixels, half of it mirrored."
    down, right = torch.randint(0, 17, (2,), generator=generator).tolist()
    size, x = x.shape[-1], F.pad(x, (8, 8, 8, 8), mode="reflect")
    x = x[..., down : down + size, right : right + size]
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None].to(x.device), x.flip(-1), x)


@torch.no_grad()
def accuracy(judge: Judge, held: ImageNet10, device) -> float:
    judge.eval()
    right = sum(
        (judge(to_float(x.to(device))).argmax(1).cpu() == y).sum()
        for x, y in zip(held.images.split(256), held.labels.split(256))
    )
    return right.item() / len(held)


def answers(judge: Judge) -> dict[str, int]:
    """The class that the judge sees in each bundled photograph: no right one is there, but it is
    always the same."""
    photos = [p for split in ("train", "val") for p in list_pictures(SAMPLE.root, split)[0]]
    x = to_float(torch.stack([torch.tensor(decode_picture(p, 64)) for p in photos]))
    with torch.no_grad():
        return dict(zip((p.stem for p in photos), judge.eval()(x).argmax(1).tolist()))


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument("--epochs", type=int, default=20)
    args = options.parse_args()
    source, device, began = imagenet10(args.data), best_device(), time.time()
    if source == SAMPLE:
        raise SystemExit("This needs ImageNet-10: name its folder with --data.")
    train, val = (ImageNet10(split, 64, source) for split in ("train", "val"))
    torch.manual_seed(0)
    generator, batch = torch.Generator().manual_seed(0), 64
    judge = Judge().to(device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    steps = len(train) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=args.epochs * steps)
    for epoch in range(args.epochs):
        judge.train()
        for rows in torch.randperm(len(train), generator=generator).split(batch)[:steps]:
            x = varied(to_float(train.images[rows].to(device)), generator).contiguous(
                memory_format=torch.channels_last
            )
            with torch.autocast(device.type, torch.bfloat16):
                logits = judge(x)
            loss = nn.functional.cross_entropy(
                logits.float(), train.labels[rows].to(device), label_smoothing=0.1
            )
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        print(
            f"epoch {epoch + 1:2}: loss {loss.item():.3f}, right on validation"
            f" {accuracy(judge, val, device):.1%}, {time.time() - began:.0f} s",
            flush=True,
        )
    OUT.mkdir(exist_ok=True)
    halved = {
        name: value.half() if value.is_floating_point() else value
        for name, value in judge.cpu().state_dict().items()
    }
    save_file(
        {name: value.contiguous() for name, value in halved.items()}, OUT / "model.safetensors"
    )
    judge.load_state_dict(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in halved.items()
        }
    )
    about = {
        "classes": train.classes,
        "accuracy": accuracy(judge, val, torch.device("cpu")),
        "answers": answers(judge),
        "validation pictures": len(val),
        "epochs": args.epochs,
        "pictures": data_fingerprint(source),
        "minutes": round((time.time() - began) / 60, 1),
        "machine": hardware(device),
    }
    (OUT / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
