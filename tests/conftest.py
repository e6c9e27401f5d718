import os
import platform
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Tests never download: the sample stands in where ROTVQ_DATA names no pictures.
os.environ.setdefault("ROTVQ_DATA", "sample")
os.environ["ROTVQ_PRESET"] = "smoke"
platform.platform()  # which starts `uname` once in a process, and a run records it
settings.register_profile("rotvq", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("rotvq")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    "Decoded pictures of the tests stay out of the user's cache."
    before = os.environ.get("ROTVQ_CACHE")
    os.environ["ROTVQ_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["ROTVQ_CACHE"]
    else:
        os.environ["ROTVQ_CACHE"] = before


@pytest.fixture
def on_the_cpu(monkeypatch):
    "Bit for bit is a promise for the CPU only; a GPU adds up some sums in any order."
    for module in ("layer.processes", "cli"):
        monkeypatch.setattr(f"rotvq.{module}.best_device", lambda: torch.device("cpu"))


@pytest.fixture
def usual_signals():
    "As in a terminal: under nohup, or behind a `&`, some are ignored from the beginning."
    usual = {
        getattr(signal, name): signal.SIG_DFL
        for name in ("SIGTERM", "SIGHUP", "SIGUSR1")
        if hasattr(signal, name)
    }
    usual[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """What `make check` runs starts no process, so no compiler and no browser; but for git, whose
    commit a run records."""
    if request.config.option.markexpr != "not slow":
        return
    start = subprocess.Popen.__init__

    def only_git(self, args, *more, **options):
        program = args if isinstance(args, str) else args[0]
        if Path(program).name != "git":
            pytest.fail(f"starts {program}: mark this test `slow`")
        start(self, args, *more, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", only_git)
