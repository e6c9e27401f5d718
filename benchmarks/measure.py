"""What the benchmarks share: seconds and peak memory of a call, and their machine."""

import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def seconds(call: Callable, device: str) -> float:
    "Wall time of one call, the device's work included."
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - start


def on_device(call: Callable, device: str, rounds: int = 15) -> float:
    """Median seconds of the device alone, by events; on a CPU those of the call. The device is kept
    busy before the first event, so that the host has launched everything when it comes to it."""
    for _ in range(3):
        call()
    if device != "cuda":
        return statistics.median(seconds(call, device) for _ in range(rounds))
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # cycles: two milliseconds
        start.record(), call(), end.record(), end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def on_host(call: Callable, device: str, count: int = 200) -> float:
    """Seconds until a call returns, many in a row: what the host spends on it, while the device
    keeps up."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(min(20, count)):
        call()
    sync()
    start = time.perf_counter()
    for _ in range(count):
        call()
    taken = (time.perf_counter() - start) / count
    sync()
    return taken


def peak_bytes(call: Callable, device: str) -> int:
    "Most memory held at one time beyond what was held before."
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    held = most = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        held += event.nbytes()
        most = max(most, held)
    return most


def in_turns(
    calls: dict[str, Callable], rounds: int, device: str, memory: bool = True
) -> dict[str, dict]:
    """Every call in each round, after two that warm up: median and quartiles of the seconds, and
    peak memory."""
    for call in calls.values():
        call(), call()
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    out = {}
    for name, call in calls.items():
        low, median, high = statistics.quantiles(times[name], n=4)
        out[name] = {"median_s": median, "quartiles_s": [low, high]} | (
            {"peak_bytes": peak_bytes(call, device)} if memory else {}
        )
    return out


def machine(device: str) -> dict:
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), name
        )
    return {
        "device": device,
        "name": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def named(machine: dict) -> str:
    'Of results: "cpu", or the name of the GPU, as in "nvidia-h200".'
    return (
        "cpu"
        if machine["device"] == "cpu"
        else re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
    )


def save(result: dict, name: str, out: Path | None) -> None:
    "Write `out`, or nbs/results/<name>_<machine>.json and, from it, the page."
    file = out or ROOT / "nbs" / "results" / f"{name}_{named(result['machine'])}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if out is None:
        page()


def page() -> None:
    "nbs/benchmarks.qmd and its figures."
    subprocess.run([sys.executable, ROOT / "tools" / "benchmarks_page.py"], check=True)
