"""The quantizer's share of a whole training step of the VQ-VAE, at a preset.

    python benchmarks/step.py [--preset cpu]

The same model, batch and optimizer with several quantizers, and with none (the encoder output goes
straight to the decoder), take turns; the share is what a step costs more than the one without.
Writes nbs/results/step_<device>.json and, from it, nbs/benchmarks.qmd. Takes about two minutes on
two cores.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from measure import in_turns, machine, save
from quantizer import Plain
from rotvq.run.training import PRESETS, Learner


class Bypass(nn.Module):
    "No quantizer: the value is `z`."

    def forward(self, z):
        return (
            z,
            torch.zeros(z.shape[0], *z.shape[2:], dtype=torch.int64, device=z.device),
            z.new_zeros(()),
        )


class Theirs(VectorQuantize):
    def forward(self, z):
        q, indices, loss = super().forward(z)
        return q, indices, loss.sum()


class PlainMaps(Plain):
    "The plain layer, for feature maps; in float32."

    def forward(self, z):
        rows = z.float().movedim(1, -1)
        with torch.autocast(z.device.type, enabled=False):
            q, indices, loss = super().forward(rows.flatten(0, -2))
        return q.view(rows.shape).movedim(-1, 1), indices.view(rows.shape[:-1]), loss


def learners(preset, device: torch.device) -> dict[str, Learner]:
    one_by_one = dataclasses.replace(preset, replay=False)
    made = {
        name: Learner(one_by_one, name if name in ("ste", "rotation") else "rotation", 0, device)
        for name in ("none", "ste", "rotation", "vector_quantize_pytorch", "plain")
    }
    if device.type == "cuda":
        made["rotation, replayed"] = Learner(
            dataclasses.replace(preset, replay=True), "rotation", 0, device
        )
    model = made["none"].model
    dim, size = model.config["dim"], model.config["codebook_size"]
    model.quantizer = Bypass()
    made["vector_quantize_pytorch"].model.quantizer = Theirs(
        dim, size, accept_image_fmap=True, decay=preset.decay, rotation_trick=True
    ).to(device)
    made["plain"].model.quantizer = PlainMaps(dim, size, preset.decay).to(device)
    for learner in made.values():
        learner.model.train()
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="default: nbs/results/step_<device>.json, and the page",
    )
    args = parser.parse_args()
    preset, device = PRESETS[args.preset], torch.device(args.device)
    x = (
        torch.rand(
            preset.batch, 3, preset.size, preset.size, generator=torch.Generator().manual_seed(0)
        )
        * 2
        - 1
    )
    x = x.to(device).contiguous(memory_format=torch.channels_last)
    made = learners(preset, device)
    config = made["rotation"].model.config
    times = in_turns(
        {name: lambda learner=learner: learner.step(x) for name, learner in made.items()},
        args.rounds,
        args.device,
        memory=False,
    )
    for name, r in times.items():
        print(
            f"{name:24} {1e3 * r['median_s']:7.1f} ms, share"
            f" {1 - times['none']['median_s'] / r['median_s']:.1%}"
        )
    scale = 2 ** config["downsamples"]
    shape = [preset.batch * (preset.size // scale) ** 2, config["dim"], config["codebook_size"]]
    save(
        {
            "machine": machine(args.device),
            "preset": args.preset,
            "rounds": args.rounds,
            "shape": shape,
            "results": times,
        },
        "step",
        args.out,
    )


if __name__ == "__main__":
    main()
