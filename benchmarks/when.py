"""What fills the codebook, and what the error is in the end: set-up by set-up, each way at its best
learning rate, for thirty epochs.

    python benchmarks/when.py [--data DIR] [--part 0/2] [--only 'revival · ste' ...]

Preset study (ImageNet-10 at 32 × 32) with bfloat16 autocast and a cosine schedule: about 80 seconds
a run on one core. A pair of set-up and estimator is tried on seed 0 at rates three times apart,
from 3e-4 and 9e-4 on, until the best of them has a worse one on either side (8.1e-3 is the highest:
at 2.4e-2 the pairs that were tried came out worse, nearly all of them by far). The two best rates
are run on seeds 1 and 2, the rate with the lowest mean is taken, and the main set-ups are run at it
on seeds 3 and 4, and at 64 × 64. Each run appends one line to nbs/results/when.jsonl; what is there
is not run again, so the script can be stopped at any moment. Two processes share the work with
--part 0/2 and --part 1/2, each with OMP_NUM_THREADS=1.

The ways of RIVALS come afterwards: in the plain set-up two or three rates around 2.7e-3 on seed 0,
the two best of them on seed 1, and the one with the lower mean on seeds 2 to 4, which had no part
in choosing it. In the set-ups of WIDER 2.7e-3 and 8.1e-3 on seed 0, and 9e-4 where the lower of
those is the better; the best on seeds 2 to 4. Of a start by k-means and one by revival only the
better on seed 0 goes on there, and skip is tried with the better of revival and the rule. At 64 ×
64 the main ways are run on seeds 0 to 2, at their rates of 32 × 32; for 90 epochs those of LONG on
the reported seeds. The rates of NEAR were all but as good as the chosen ones; the reported seeds
are run there, too. With --again the reported runs of the plain set-up that another machine made are
repeated on this one, in nbs/results/when_again.jsonl. Where runs are there already, they count.
DiVeQ needs the extra: pip install ".[benchmarks]". (The cosine lookup under straight-through has
three runs more, at 8.1e-3: with seeds 1 and 2 its best rate lay at the edge of what had been
tried.)
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from rotvq import Quantized, nearest_code
from rotvq.layer.relatives import SimVQ
from rotvq.run.bench import trial, turn_only
from rotvq.run.data import SAMPLE, ImageNet10, imagenet10
from rotvq.run.records import hardware
from rotvq.run.training import PRESETS, Config
from rotvq.run.when import FSQ, learnable, normalized, quantized_by
from rotvq.run.why import Pull, after_encoder, half_placed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results" / "when.jsonl"
AGAIN = RESULTS.with_name("when_again.jsonl")
STUDY = dataclasses.replace(PRESETS["study"], epochs=30, schedule="cosine", precision="bfloat16")
RATES, HIGHEST, TUNING, SEEDS, MORE = (3e-4, 9e-4), 8.1e-3, 0, (1, 2), (3, 4)
# the best of the first table and what is three times beside it, the last where it is due
AROUND, REPORTED = (2.7e-3, 8.1e-3, 9e-4), (2, 3, 4)
FEWER, DIVEQ_RATES = AROUND[:2], (8.1e-3, 2.7e-3, 2.4e-2)
BOTH = "ste", "rotation"


class SetUp(NamedTuple):
    "What is changed, and the estimators that are compared in it."

    settings: dict
    change: Callable | None = None
    estimators: tuple[str, ...] = BOTH


SIM = quantized_by(
    lambda vq: SimVQ(
        vq.dim,
        vq.codebook_size,
        estimator=vq.estimator,
        commitment=vq.commitment,
        channel_first=True,
    )
)
KMEANS, REVIVAL = {"init": "kmeans"}, {"revive_after": 50}
SETUPS = {
    "plain": SetUp({}, estimators=(*BOTH, "rotation-then-ste")),
    "k-means start": SetUp(KMEANS),
    "revival": SetUp(REVIVAL),
    "k-means start and revival": SetUp(KMEANS | REVIVAL),
    "cosine": SetUp({"distance": "cosine"}),
    "β = 1/4, decay 0.99": SetUp({"commitment": 0.25, "decay": 0.99}),
    "learnable codebook": SetUp({}, learnable),
    "learnable codebook, β = 1/4": SetUp({"commitment": 0.25}, learnable),
    "learnable codebook, k-means start": SetUp(KMEANS, learnable),
    "SimVQ": SetUp({}, SIM),
    "FSQ": SetUp({}, quantized_by(lambda vq: FSQ(vq.dim)), ("ste",)),
    "k-means start and revival, width 8": SetUp(
        KMEANS | REVIVAL | {"width": 8}, estimators=("ste",)
    ),
    "FSQ, width 8": SetUp({"width": 8}, quantized_by(lambda vq: FSQ(vq.dim)), ("ste",)),
    "SimVQ, β = 1/4": SetUp({"commitment": 0.25}, SIM),
}
MAIN, LARGE, LONGER = ("plain", "k-means start", "revival"), ", 64 × 64", ", 90 epochs"
SKIP = {"skip": 0.2}
PULLS = 0.03, 0.1, 0.3


class DiVeQ(torch.nn.Module):
    "DIVEQ of the package diveq, with its own revival, in the place of the layer."

    def __init__(self, vq):
        super().__init__()
        from diveq import DIVEQ

        self.inner = DIVEQ(vq.codebook_size, vq.dim, verbose=False, allow_warning=False)

    def forward(self, z):
        flat = z.float().movedim(1, -1).flatten(0, -2)
        with torch.autocast(z.device.type, enabled=False):
            if self.training:
                q, indices, _ = self.inner(flat)
            else:
                indices = nearest_code(flat, self.inner.codebook.detach())
                q = self.inner.codebook[indices]
        q = q.view(*z.movedim(1, -1).shape).movedim(-1, 1)
        return Quantized(q, indices.view(len(z), *z.shape[2:]), z.new_zeros(()))


FUNCTIONS = {
    "turn": turn_only,
    "diveq": "ste",
}  # names of this script that the package does not have
# what is put beside each other in a set-up: the estimator, and what is added to the set-up's name
# and settings
STE, RULE = "ste", "rotation-until-used"
WAYS = {
    "straight-through": (STE, "", {}),
    "revival": (STE, ", revival", REVIVAL),
    "k-means start": (STE, ", k-means start", KMEANS),
    "rotation": ("rotation", "", {}),
    "hand-over": ("rotation-then-ste", "", {}),
    "rule": (RULE, "", {}),
    "rule, revival": (RULE, ", revival", REVIVAL),
    "rule, revival auto": (RULE, ", revival auto", {"revive_after": "auto"}),
    "revival, skip": (STE, ", revival, skip", REVIVAL | SKIP),
    "rule, skip": (RULE, ", skip", SKIP),
}
# with 512 codes at 32 × 32 that is after 50 batches, one and the same run
AUTO = "rule, revival auto"
WIDER = {
    "K = 4,096": SetUp({"codebook_size": 4096}),
    "β = 1/4, decay 0.99": SETUPS["β = 1/4, decay 0.99"],
    "learnable codebook": SETUPS["learnable codebook"],
    "learnable codebook, k-means start": SETUPS["learnable codebook, k-means start"],
    "GroupNorm": SetUp({}, normalized),
    "cosine, half placed": SetUp({"distance": "cosine"}, half_placed),
}


def name_in(base: str, added: str) -> str:
    "The set-up of a way in `base`: the plain one has no name of its own."
    return added[2:] if base == "plain" and added else base + added


for _base, _setup in {"plain": SETUPS["plain"], **WIDER}.items():
    for _estimator, _added, _settings in WAYS.values():
        SETUPS.setdefault(
            name_in(_base, _added), SetUp(_setup.settings | _settings, _setup.change, ())
        )
SETUPS |= {f"pull {weight}": SetUp({}, after_encoder(Pull(weight)), ()) for weight in PULLS}
SETUPS["DiVeQ"] = SetUp({}, quantized_by(DiVeQ), ())
# pairs of set-up and estimator; those of the plain set-up are tuned on seeds 0 and 1
RIVALS = [
    (name_in("plain", added), estimator)
    for way, (estimator, added, _) in WAYS.items()
    if way != AUTO
]
RIVALS += [
    ("k-means start and revival", STE),
    ("plain", "turn"),
    ("DiVeQ", "diveq"),
    *((f"pull {weight}", STE) for weight in PULLS),
]
OTHERS = [
    (base, way)
    for base in WIDER
    for way in WAYS
    if not ("start" in way and ("start" in base or "placed" in base))
    and (way != AUTO or "K = " in base)
]
# of these two only the better on the tuning seed goes on
EITHER = {
    "revival": "k-means start",
    "k-means start": "revival",
    "revival, skip": "rule, skip",
    "rule, skip": "revival, skip",
}
LARGER, LONG = ("hand-over", "rule", AUTO, "rule, skip"), ("straight-through", "rule", "hand-over")
NEAR = [("K = 4,096", "revival", 2.7e-3), ("learnable codebook", "rule, revival", 2.7e-3)]
NEAR += [
    (base, "revival, skip", 2.7e-3) for base in ("K = 4,096", "learnable codebook, k-means start")
]


def base_of(name: str) -> str:
    return name.removesuffix(LARGE).removesuffix(LONGER)


def config_of(name: str, lr: float) -> Config:
    more = {"size": 64} if name.endswith(LARGE) else {"epochs": 90} if name.endswith(LONGER) else {}
    return dataclasses.replace(STUDY, lr=lr, **SETUPS[base_of(name)].settings, **more)


def key_of(name: str, estimator: str, lr: float, seed: int) -> dict:
    "What a run is known by: its config where it differs from the preset, too."
    preset, config = (dataclasses.asdict(c) for c in (PRESETS["study"], config_of(name, lr)))
    settings = {key: value for key, value in config.items() if value != preset[key]}
    return {"setup": name, "estimator": estimator, "lr": lr, "seed": seed, "settings": settings}


def read(file: Path | None = None) -> list[dict]:
    file = file or RESULTS
    return (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if file.exists()
        else []
    )


def by_rate(rows: list[dict], name: str, estimator: str) -> dict[float, dict[int, float]]:
    "Final errors of a pair, by seed; rates in the order of the tuning seed's."
    held: dict = {}
    for row in rows:
        if (row["setup"], row["estimator"]) == (name, estimator):
            held.setdefault(row["lr"], {})[row["seed"]] = row["mse"][-1]
    return dict(sorted(held.items(), key=lambda item: item[1][TUNING]))


def next_rate(rows: list[dict], name: str, estimator: str) -> float | None:
    """Three times beyond the best rate where no rate has been tried on that side; None where there
    are worse ones on both."""
    tried = by_rate(rows, name, estimator)
    best = next(iter(tried))
    near = float(f"{3 * best:.2g}"), float(f"{best / 3:.2g}")
    return next((lr for lr in near if lr not in tried and lr <= HIGHEST), None)


def two_rates(rows: list[dict], name: str, estimator: str) -> list[float]:
    return list(by_rate(rows, name, estimator))[:2]


def best_rate(rows: list[dict], name: str, estimator: str) -> float:
    "Of those that three seeds were run at, that with the lowest mean."
    held = {
        lr: runs
        for lr, runs in by_rate(rows, name, estimator).items()
        if {TUNING, *SEEDS} <= runs.keys()
    }
    return min(held, key=lambda lr: sum(held[lr][seed] for seed in (TUNING, *SEEDS)))


def run(key: dict, source: str) -> dict:
    name, estimator, lr, seed, _ = key.values()
    config = config_of(name, lr)
    pictures = tuple(ImageNet10(split, config.size, source).images for split in ("train", "val"))
    function = FUNCTIONS.get(estimator, estimator)
    done = trial(function, config, seed, pictures, SETUPS[base_of(name)].change)
    names = "mse", "usage", "perplexity", "relative_error"
    curves = {key: [float(f"{row[key]:.4g}") for row in done.rows] for key in names}
    return (
        key
        | {"seconds": round(done.seconds, 1)}
        | curves
        | {"machine": hardware(torch.device("cpu"))["name"]}
    )


def once(name: str, estimator: str, lr: float, seed: int, source: str, file: Path | None = None):
    "Run and record, unless that has been done."
    key = key_of(name, estimator, lr, seed)
    if any(key.items() <= row.items() for row in read(file)):
        return
    row = run(key, source)
    with open(file or RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(
        f"{name:34} {estimator:18} lr {lr:.0e}  seed {seed}  MSE {row['mse'][-1]:.4f}  codes used"
        f" {row['usage'][-1]:.1%}  {row['seconds']:.0f} s",
        flush=True,
    )


def seeds_of(rows: list[dict], name: str, estimator: str, lr: float) -> set[int]:
    return {
        row["seed"]
        for row in rows
        if (row["setup"], row["estimator"], row["lr"]) == (name, estimator, lr)
    }


def pair_in(base: str, way: str) -> tuple[str, str]:
    estimator, added, _ = WAYS[way]
    return name_in(base, added), estimator


def rates_of(name: str, estimator: str) -> tuple[float, ...]:
    if estimator == "diveq":
        return DIVEQ_RATES
    return FEWER if name.startswith("pull") or "skip" in name or estimator == "turn" else AROUND


def tuned_rate(rows: list[dict], name: str, estimator: str, tuning: tuple[int, ...]) -> float:
    "The rate with the lowest mean on the seeds that tune."
    whole = {
        lr: sum(runs[seed] for seed in tuning)
        for lr, runs in by_rate(rows, name, estimator).items()
        if lr in rates_of(name, estimator) and set(tuning) <= runs.keys()
    }
    return min(whole, key=whole.get)


def next_of(
    rows: list[dict], name: str, estimator: str, tuning: tuple[int, ...], reports: bool = True
) -> tuple[float, int] | None:
    """The next rate and seed to run: rates on the first seed, the two best on another that tunes,
    the best of those on the reported ones."""
    first, *further = tuning
    rates = rates_of(name, estimator)
    for lr in rates:
        # below the lower of two rates there is nothing to look for where the higher one was the
        # better
        if lr == AROUND[2] and next(iter(by_rate(rows, name, estimator))) == AROUND[1]:
            continue
        if first not in seeds_of(rows, name, estimator, lr):
            return lr, first
    held = {lr: runs for lr, runs in by_rate(rows, name, estimator).items() if lr in rates}
    for seed in further:
        for lr in list(held)[:2]:
            if seed not in held[lr]:
                return lr, seed
    lr = tuned_rate(rows, name, estimator, tuning)
    return next(((lr, seed) for seed in REPORTED if reports and seed not in held[lr]), None)


def least(rows: list[dict], name: str, estimator: str) -> float:
    "The least error on the tuning seed."
    return min(
        (runs[TUNING] for runs in by_rate(rows, name, estimator).values()), default=float("inf")
    )


def goes_on(rows: list[dict], base: str, way: str) -> bool:
    """Whether a way of a wider set-up is run beyond the tuning seed; with skip, at all: it is added
    to the better of revival and the rule."""
    other = EITHER.get(way)
    if (base, other) not in OTHERS:
        return True
    mine, its = (least(rows, *pair_in(base, one.removesuffix(", skip"))) for one in (way, other))
    return mine <= its


def repeat(source: str):
    "The reported runs of the plain set-up that another machine made, on this one."
    rows, here = read(), hardware(torch.device("cpu"))["name"]
    for row in rows:
        pair, lr, seed = (row["setup"], row["estimator"]), row["lr"], row["seed"]
        if (
            pair in RIVALS
            and seed in REPORTED
            and row["machine"] != here
            and lr == tuned_rate(rows, *pair, (0, 1))
        ):
            once(*pair, lr, seed, source, AGAIN)


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument(
        "--part",
        default="0/1",
        help="this process takes every n-th pair of set-up and estimator: k/n",
    )
    options.add_argument("--only", nargs="*", help="only these pairs of 'set-up · estimator'")
    options.add_argument(
        "--again",
        action="store_true",
        help="repeat here what another machine made, and nothing else",
    )
    args = options.parse_args()
    source = imagenet10(args.data)
    if source == SAMPLE:
        raise SystemExit("This experiment needs ImageNet-10: name its folder with --data.")
    if args.again:
        return repeat(source)
    part, parts = map(int, args.part.split("/"))

    def own(pairs):
        return [pair for pair in pairs if not args.only or " · ".join(pair) in args.only][
            part::parts
        ]

    mine = own(
        [(name, estimator) for name, setup in SETUPS.items() for estimator in setup.estimators]
    )
    for pair in mine:
        for lr in RATES:
            once(*pair, lr, TUNING, source)
        while lr := next_rate(read(), *pair):
            once(*pair, lr, TUNING, source)
    for seed in SEEDS:
        for pair in mine:
            for lr in two_rates(read(), *pair):
                once(*pair, lr, seed, source)
    for seed in MORE:
        for pair in mine:
            if pair[0] in MAIN:
                once(*pair, best_rate(read(), *pair), seed, source)
    for seed in (TUNING, *SEEDS):
        for name, estimator in mine:
            if name in MAIN:
                once(name + LARGE, estimator, best_rate(read(), name, estimator), seed, source)
    for pair in own(RIVALS):
        while due := next_of(read(), *pair, (0, 1)):
            once(*pair, *due, source)
    wider = [
        (base, way)
        for base, way in OTHERS
        if pair_in(base, way) in own([pair_in(*place) for place in OTHERS])
    ]
    for reports in (False, True):
        for base, way in wider:
            if (reports or "skip" in way) and not goes_on(read(), base, way):
                continue
            while due := next_of(read(), *pair_in(base, way), (TUNING,), reports):
                once(*pair_in(base, way), *due, source)
    for seed in (TUNING, *SEEDS):
        for way in LARGER:
            small = pair_in("plain", way.removesuffix(" auto"))  # which has the rate
            if own([small]):
                once(
                    pair_in("plain", way)[0] + LARGE,
                    small[1],
                    tuned_rate(read(), *small, (0, 1)),
                    seed,
                    source,
                )
    for seed in REPORTED:
        for way in LONG:
            pair = pair_in("plain", way)
            if own([pair]):
                once(pair[0] + LONGER, pair[1], tuned_rate(read(), *pair, (0, 1)), seed, source)
        for base, way, lr in NEAR:
            if own([pair_in(base, way)]):
                once(*pair_in(base, way), lr, seed, source)


if __name__ == "__main__":
    main()
