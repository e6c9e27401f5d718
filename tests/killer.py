"""Trains in children that are killed at random moments, until one gets through. Prints how many were killed and what they left.

    python tests/killer.py OUT SEED [LIMIT]

PyTorch is imported once and the children are forked, so a kill costs no start. A state is written after every step, so that many
kills fall into the middle of a write.
"""
import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from rotvq.runs import states_of
from rotvq.training import PRESETS, train

CONFIG = dataclasses.replace(PRESETS["smoke"], name="killed", limit=96, epochs=8, schedule="cosine", warmup=1.0, ema=0.9, revive_after=2, micro_batch=8, switch=2)
ESTIMATORS = ("ste", "rotation-then-ste")


def attempt(out: Path) -> None:
    "In a child: begin or go on, and leave without the parent's clean-up."
    try:
        train(CONFIG, ESTIMATORS, "sample", out, resume="auto", quiet=True, save_minutes=0)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def main(out: Path, seed: int, limit: int = 200) -> dict:
    torch.set_num_threads(1)
    rng, kills, halves, before, patience = random.Random(seed), 0, 0, [], 1.0
    while kills < limit:
        if kills and states_of(out)[:1] == before: patience *= 1.3         # a slow machine: no child has come further
        before = states_of(out)[:1]
        child = os.fork()
        if child == 0: attempt(out)
        end = time.monotonic() + patience * rng.uniform(0.15, 0.7)
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done: return {"kills": kills, "half_written": halves, "exit": os.waitstatus_to_exitcode(status)}
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        halves += bool(list(out.rglob(".[!l]*.*")))
    return {"kills": kills, "half_written": halves, "exit": None}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
