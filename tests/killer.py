"""Trains in children that are killed at random moments, until one gets through. Prints how many
were killed and what they left.

    python tests/killer.py OUT SEED [LIMIT]

PyTorch is imported once and the children are forked, so a kill costs no start. A state is written
after every step. Every second kill is aimed: after its random moment the child is halted, looked at
and let go on until it stands in the middle of a write.
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from rotvq.run.records import states_of
from rotvq.run.training import PRESETS, train

CONFIG = dataclasses.replace(
    PRESETS["smoke"],
    name="killed",
    limit=96,
    epochs=8,
    schedule="cosine",
    warmup=1.0,
    ema=0.9,
    revive_after=2,
    micro_batch=8,
    switch=2,
)
ESTIMATORS = ("ste", "rotation-then-ste")


def attempt(out: Path) -> None:
    "In a child: begin or go on, and leave without the parent's clean-up."
    try:
        train(CONFIG, ESTIMATORS, "sample", out, resume="auto", quiet=True, save_minutes=0)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def partial(out: Path) -> set:
    """What is being written, or was when a process ended: hidden files with an ending (without one
    is the lock), as they are now."""
    seen = set()
    for file in out.rglob(".*.*"):
        with contextlib.suppress(FileNotFoundError):
            seen.add((file, file.stat().st_ino, file.stat().st_mtime_ns))
    return seen


def ended(child: int, flags: int = os.WNOHANG) -> int | None:
    "The exit code of a child that has left by itself, or None."
    done, status = os.waitpid(child, flags)
    return os.waitstatus_to_exitcode(status) if done and not os.WIFSTOPPED(status) else None


def wait_for_a_write(
    child: int, out: Path, left: set, seconds: float, rng: random.Random
) -> int | None:
    """Leaves the child halted in the middle of a write, or as it is after `seconds`; the exit code
    if it came to its end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        os.kill(child, signal.SIGSTOP)
        if (code := ended(child, os.WUNTRACED)) is not None:
            return code
        if partial(out) - left:
            return None
        os.kill(child, signal.SIGCONT)
        time.sleep(rng.uniform(0.001, 0.01))
    return None


def main(out: Path, seed: int, limit: int = 200) -> dict:
    torch.set_num_threads(1)
    rng, kills, halves, before, patience = random.Random(seed), 0, 0, [], 1.0
    while kills < limit:
        if kills and states_of(out)[:1] == before:
            patience *= 1.3  # a slow machine: no child has come further
        before, left = states_of(out)[:1], partial(out)
        child = os.fork()
        if child == 0:
            attempt(out)
        end, code = time.monotonic() + patience * rng.uniform(0.15, 0.7), None
        while code is None and time.monotonic() < end:
            time.sleep(0.005)
            code = ended(child)
        if code is None and kills % 2:
            code = wait_for_a_write(child, out, left, 20 * patience, rng)
        if code is not None:
            return {"kills": kills, "half_written": halves, "exit": code}
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        halves += bool(partial(out) - left)
    return {"kills": kills, "half_written": halves, "exit": None}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
