"""Several small trainings side by side on one GPU: each step is a CUDA graph, replayed on a stream
of its own.

    python benchmarks/many_trainings.py [JOBS.jsonl] [--data DIR] [--wide 8] [--out FILE]

A small model leaves most of a GPU idle, and the host is slower than the device; a replayed graph
costs the host one call a step, and the streams of several jobs overlap. A job is a line of JSON
with an estimator, a seed, a preset and any other field of a Config:

    {"estimator": "rotation-then-ste", "seed": 1, "preset": "study", "epochs": 30, "lr": 0.0009}

benchmarks/rivals_128.jsonl holds the ways of the chapter "When" at 128 × 128, seed by seed. At most
--wide jobs are alive; one that is finished makes room for the next. After each epoch of a job its
validation is printed, as a line of JSON, and at the end of a job (or of the time) its line goes to
--out. Without JOBS: six jobs of the preset study, one of them first by itself, and how many
pictures a second the GPU takes either way. On a CPU, or with --rehearse (a tiny form of that), the
same steps run without graphs, one after the other.
"""

import argparse
import dataclasses
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from rotvq import learn_after
from rotvq.run.data import SAMPLE, ImageNet10, imagenet10
from rotvq.run.training import (
    PRESETS,
    Config,
    Learner,
    evaluate,
    order_of,
    rate,
    steps_in_epoch,
    to_float,
)

TURNS = 10  # replays of a job before the next one has its turn
MEASURES = ("mse", "quantization_error", "relative_error", "usage", "perplexity")


class Job(Learner):
    """A training whose step asks the host for nothing: pictures, order, mirror images and rates lie
    on the device."""

    def __init__(
        self,
        config: Config,
        estimator: str,
        seed: int,
        pictures: tuple[Tensor, Tensor],
        device: torch.device,
        about: dict | None = None,
    ):
        if config.micro_batch or config.init == "kmeans" or config.ema:
            raise ValueError(
                'micro_batch, init="kmeans" and ema are not for this script; use rotvq train.'
            )
        super().__init__(dataclasses.replace(config, replay=False), estimator, seed, device)
        self.images, self.val = pictures
        self.about = {"estimator": estimator, "seed": seed} | (about or {})
        self.steps, self.epoch, self.rows, self.began = (
            steps_in_epoch(config, len(self.images)),
            0,
            [],
            time.monotonic(),
        )
        self.batch = min(config.batch, config.epoch_pictures or len(self.images))
        rates = [rate(config, step, self.steps) for step in range(config.epochs * self.steps)]
        self.rates = torch.tensor([*rates, rates[-1]], device=device)
        self.rate = self.rates[0].clone()
        self.opt = torch.optim.AdamW(
            self.model.parameters(),
            self.rate,
            (0.9, 0.99),
            weight_decay=config.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        learn_after(self.model, self.opt)
        self.done, self.inside = (
            torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)
        )  # steps, of all and of this epoch
        self.order = torch.zeros(self.steps, self.batch, dtype=torch.int64, device=device)
        self.flips = torch.zeros(self.steps, self.batch, dtype=torch.bool, device=device)
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.graph = self.captured = None  # and the estimator that it was captured with

    def one(self) -> None:
        "One step, the same as that of `rotvq train`."
        pick = lambda rows, k: rows.index_select(0, k.view(1))[0]
        x = to_float(self.images.index_select(0, pick(self.order, self.inside)))
        x = torch.where(pick(self.flips, self.inside)[:, None, None, None], x.flip(-1), x)
        self.rate.copy_(pick(self.rates, self.done))
        self.take(x.contiguous(memory_format=torch.channels_last))
        self.done += 1
        self.inside += 1

    def begin_epoch(self) -> None:
        "The order of the pictures; and a graph, where there is none of this epoch's estimator."
        order, flips = order_of(
            len(self.images), self.config.epoch_pictures or len(self.images), self.seed, self.epoch
        )
        count = self.steps * self.batch
        (
            self.order.copy_(order[:count].view(self.steps, -1)),
            self.flips.copy_(flips[:count].view(self.steps, -1)),
            self.inside.zero_(),
        )
        self.begin(self.epoch)
        if self.stream is None:
            return
        if self.captured != self.model.quantizer.estimator:
            self.capture()
        self.stream.wait_stream(
            torch.cuda.current_stream()
        )  # for the order, and for the evaluation before

    def capture(self) -> None:
        """Warm up (the layer looks at its tenth batch), capture one step, and put everything back
        as it was."""
        changing = [*self.model.state_dict().values(), self.done, self.inside, self.rate]
        held = [value.clone() for value in changing]
        before = {
            p: {k: v.clone() for k, v in state.items()} for p, state in self.opt.state.items()
        }
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(11):
                self.done.zero_(), self.inside.zero_(), self.one()
            self.stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.one()
            with torch.no_grad():
                for value, old in zip(changing, held):
                    value.copy_(old)
                for p, state in self.opt.state.items():
                    for k, v in state.items():
                        v.copy_(before[p][k]) if p in before else v.zero_()
        self.stream.synchronize()
        self.captured = self.model.quantizer.estimator

    def replay(self, count: int) -> None:
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            for _ in range(count):
                self.graph.replay() if self.graph else self.one()

    def end_epoch(self) -> None:
        if self.stream:
            self.stream.synchronize()
        self.epoch += 1
        seen = evaluate(self.model, self.val, 512)
        self.rows.append(
            {"epoch": self.epoch} | {key: float(f"{seen[key]:.5g}") for key in MEASURES}
        )
        print(json.dumps(self.about | self.rows[-1]), flush=True)

    @property
    def ended(self) -> bool:
        return self.epoch == self.config.epochs

    def line(self) -> dict:
        return self.about | {
            "config": dataclasses.asdict(self.config),
            "seconds": round(time.monotonic() - self.began, 2),
            "ended": self.ended,
            "rows": self.rows,
        }


def carry_out(
    waiting: list, wide: int, seconds: float, out: Path | None = None
) -> tuple[list[dict], float]:
    """The lines of all jobs that began, and the pictures a second of their training. `waiting`:
    functions that make a job, taken from it."""
    until, live, lines, pictures, spent = time.monotonic() + seconds, [], [], 0, 0.0

    def keep(jobs: list[Job]) -> None:
        lines.extend(job.line() for job in jobs)
        if out is None:
            return
        with open(out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(job.line()) + "\n" for job in jobs)

    while (waiting or live) and time.monotonic() < until:
        while waiting and len(live) < wide:
            live.append(waiting.pop(0)())
        for job in live:
            job.begin_epoch()
        began = time.monotonic()
        for first in range(0, max(job.steps for job in live), TURNS):
            for job in live:
                job.replay(max(0, min(TURNS, job.steps - first)))
        for job in live:
            if job.stream:
                job.stream.synchronize()
        spent, pictures = (
            spent + time.monotonic() - began,
            pictures + sum(job.steps * job.batch for job in live),
        )
        for job in live:
            job.end_epoch()
        keep([job for job in live if job.ended])
        live = [job for job in live if not job.ended]
    keep(live)
    return lines, pictures / max(spent, 1e-9)


class Makers:
    "Jobs from their descriptions; the pictures of a size lie on the device once."

    def __init__(self, source, device: torch.device):
        self.source, self.device, self.held = source, device, {}

    def pictures(self, config: Config) -> tuple[Tensor, Tensor]:
        key = config.size, config.limit
        if key not in self.held:
            self.held[key] = tuple(
                ImageNet10(split, config.size, self.source, config.limit).images.to(self.device)
                for split in ("train", "val")
            )
        return self.held[key]

    def __call__(self, about: dict):
        settings = dict(about)
        estimator, seed, preset = (
            settings.pop("estimator"),
            settings.pop("seed", 0),
            settings.pop("preset", "study"),
        )
        config = dataclasses.replace(PRESETS[preset], **settings)
        return lambda: Job(config, estimator, seed, self.pictures(config), self.device, about)


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("jobs", nargs="?", type=Path)
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument("--wide", type=int, default=8)
    options.add_argument("--seconds", type=float, default=600)
    options.add_argument("--rehearse", action="store_true")
    options.add_argument(
        "--out",
        type=Path,
        help="a line for each job that has ended, or was alive at the end of the time",
    )
    options.add_argument(
        "--speed", type=Path, help="without JOBS: a file for the pictures a second"
    )
    args = options.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.rehearse else "cpu")
    torch.backends.cudnn.benchmark = True
    make = Makers(
        (
            SAMPLE
            if args.rehearse
            else imagenet10(args.data or os.environ.get("ROTVQ_DATA"), download=False)
        ),
        device,
    )
    if args.jobs:
        described = [
            json.loads(line)
            for line in args.jobs.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        waiting = [make(about) for about in described]
        lines, _ = carry_out(waiting, args.wide, args.seconds, args.out)
    else:
        small = (
            {"preset": "smoke", "limit": 64, "epochs": 2, "switch": 1}
            if args.rehearse
            else {"epochs": 2, "switch": 1, "precision": "bfloat16"}
        )
        described = [
            {"estimator": name, "seed": seed} | small
            for seed in range(1 if args.rehearse else 2)
            for name in ("ste", "rotation", "rotation-then-ste")
        ]
        _, alone = carry_out([make(described[0])], 1, args.seconds)
        waiting = [make(about) for about in described]
        lines, together = carry_out(waiting, args.wide, args.seconds, args.out)
        said = json.dumps(
            {
                "device": device.type,
                "pictures_per_second": {
                    "one alone": round(alone),
                    f"{len(described)} side by side": round(together),
                },
            }
        )
        print(said, flush=True)
        if args.speed:
            args.speed.write_text(said + "\n", encoding="utf-8")
    unfinished = sum(not line["ended"] for line in lines)
    if waiting or unfinished:
        raise SystemExit(
            f"No time was left: {len(waiting)} jobs did not begin, {unfinished} did not end."
        )


if __name__ == "__main__":
    main()
