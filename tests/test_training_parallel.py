"""Training with two processes over gloo: what one process with the joint batch would have, and an
elastic restart."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

import helpers
from rotvq import VQVAE
from rotvq.layer.processes import from_first, rank_of, world_size
from rotvq.run.data import SAMPLE
from rotvq.run.training import train

pytestmark = pytest.mark.slow

TINY = dataclasses.replace(helpers.TINY, limit=64)
WAYS = {
    "plain": {},
    "micro-batches": {"micro_batch": 2},
    "k-means": {"init": "kmeans"},
    "averaged": {"ema": 0.9, "schedule": "cosine", "warmup": 1.0},
    "compiled": {"compile": True, "epochs": 1, "blocks": 1},
    "bfloat16": {"precision": "bfloat16"},
    "one validation picture": {"batch": 4, "limit": None},  # a process has none
}


def pictures(name, folder):
    return f"{folder}/pictures" if name == "one validation picture" else SAMPLE


def process(rank, folder):
    os.environ["ROTVQ_CACHE"] = f"{folder}/cache"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, changes in WAYS.items():
        run = train(
            dataclasses.replace(TINY, **changes),
            "rotation",
            pictures(name, folder),
            f"{folder}/{name}",
            quiet=True,
            device="cpu",
        )
        torch.save(run.rows, f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("together")
    helpers.picture_folder(place / "pictures", train=8, val=1)
    mp.start_processes(process, (str(place),), nprocs=2, start_method="spawn")
    return place


@pytest.mark.parametrize("name", list(WAYS))
def test_two_processes_end_where_one_would(folder, tmp_path, name):
    alone = train(
        dataclasses.replace(TINY, **WAYS[name] | {"compile": False}),
        "rotation",
        pictures(name, folder),
        tmp_path / "alone",
        quiet=True,
        device="cpu",
    )
    loose = name == "bfloat16"
    for rank in (0, 1):
        rows = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
        for row, expected in zip(rows, alone.rows, strict=True):
            for key in ("mse", "train_mse", "usage", "perplexity", "batch_perplexity"):
                assert row[key] == pytest.approx(expected[key], rel=0.1 if loose else 1e-3), key
    a, b = (
        VQVAE.from_pretrained(folder / name).state_dict(),
        VQVAE.from_pretrained(tmp_path / "alone").state_dict(),
    )
    if not loose:
        for key in a:
            assert_close(a[key], b[key], rtol=1e-3, atol=2e-4)


def test_only_the_first_process_writes_and_the_other_can_go_on_alone(folder):
    "The state of a run of two processes is continued by one."
    held = [file.name for file in (folder / "plain" / "states").iterdir()]
    assert sorted(held) == ["00001-0000000.pt", "00002-0000000.pt"]
    (folder / "plain" / "states" / "00002-0000000.pt").unlink()
    before = VQVAE.from_pretrained(folder / "plain").state_dict()
    train(TINY, "rotation", SAMPLE, folder / "plain", resume=True, quiet=True, device="cpu")
    for key, value in VQVAE.from_pretrained(folder / "plain").state_dict().items():
        assert_close(value, before[key], rtol=1e-3, atol=2e-4)


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.setattr("rotvq.run.training.world_size", lambda: 3)
    from rotvq.run.training import batches

    with pytest.raises(ValueError, match="16 cannot be divided among 3.*batch = 15"):
        next(batches(torch.zeros(64, 3, 4, 4, dtype=torch.uint8), TINY, 0, 0))


@pytest.mark.skipif(
    not torch.__version__ >= "2.14",
    reason=(
        "restarted workers of an old PyTorch (2.6 was tried) sometimes hang when they leave their"
        " group"
    ),
)
def test_torchrun_restarts_after_a_fault_and_goes_on(tmp_path):
    """A worker dies once in the middle of the second epoch; the restarted group ends where a run
    without a fault ends."""
    script = tmp_path / "faulty.py"
    script.write_text(
        "import os, sys; from pathlib import Path; import torch; torch.set_num_threads(1); import"
        " rotvq.run.training as t; from rotvq.cli import main\nstep, calls = t.Learner.step, []\n"
        "mark = Path(sys.argv[1]) / 'died'\n"
        "def once(self, x, lr=None):\n    calls.append(1)\n    if"
        " len(calls) == 11 and os.environ['RANK'] == '1' and not mark.exists(): mark.touch();"
        " os._exit(3)\n    return step(self, x, lr)\nt.Learner.step = once\nsys.exit(main(['train',"
        " '--preset', 'smoke', '--estimators', 'ste', '--data', 'sample', '--out', sys.argv[1] +"
        " '/run', '--resume-if-any']))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "--monitor-interval",
        "0.2",
        str(script),
        str(tmp_path),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, errors = child.communicate(timeout=150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its workers as well
    assert child.returncode == 0, errors[-3000:]
    assert (tmp_path / "died").exists() and said.count("run folder") == 2
    whole = train("smoke", "ste", SAMPLE, tmp_path / "whole", quiet=True, device="cpu")
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["mse"] for row in rows] == pytest.approx(
        [row["mse"] for row in whole.rows], rel=1e-3
    )


def test_one_process_needs_nobody():
    assert world_size() == 1 and rank_of() == 0 and from_first("x") == "x"
