"""The first thing to run on a GPU, made for the few minutes for which one is at hand.

    python benchmarks/gpu_check.py --minutes 5      (make gpu-check)
    python benchmarks/gpu_check.py --rehearse       the same on a CPU, in tiny sizes

Parts in order of their worth: the tests for CUDA, the layer, the kernels, training steps side by
side, two hundred steps, several trainings at once, and as many epochs of the full run as the rest
of the time allows. Each is a process with a time limit of its own, and its result is on disk at
once: at most eight files in gpu-check/, of which report.json says what began, passed and took how
long. Exits with 0 only if some part began and all that began passed.

Runs from the source tree with Python 3.11 and PyTorch with torchvision; no network is needed. What
else is missing comes from gpu-bundle/, which `make gpu-bundle` fills elsewhere: packages (installed
into .gpu-site/) and pictures (unpacked into data/). The full run takes these, or those of
ROTVQ_DATA, else the bundled sample, and the report says which. `--record`, in a clone of the
repository, puts the results of a check into nbs/results/, named after the GPU, and makes the page
of benchmarks anew.
"""

import argparse
import configparser
import dataclasses
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / ".gpu-site"
FILES = (
    "report.json",
    "log.txt",
    "tests.txt",
    "quantizer.json",
    "kernels.json",
    "step.json",
    "steps.json",
    "metrics.jsonl",
)
# the most seconds that a part takes of a check of five minutes; `run` gets what is left
LIMITS = {
    "tests": 110,
    "layer": 40,
    "kernels": 40,
    "step": 40,
    "steps": 45,
    "together": 40,
    "run": None,
}
LEAST = {"run": 45}  # seconds; with less left (else 10) a part does not begin
NO_TIME = 75  # exit status of a run that had no time for an epoch


# Before anything is imported that may be missing


def needed() -> list[str]:
    "Distributions that the check imports, by settings.ini, and what its tests need."
    held = configparser.ConfigParser(interpolation=None)
    held.read(ROOT / "settings.ini", encoding="utf-8")
    names = [word.split(">=")[0] for word in held["DEFAULT"]["requirements"].split()]
    return [*names, "vector-quantize-pytorch", "pytest", "hypothesis"]


def absent(names) -> list[str]:
    def here(name: str) -> bool:
        try:
            return bool(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            return False

    return [name for name in names if not here(name)]


def install(bundle: Path) -> None:
    "Wheels of the bundle that the machine lacks, into .gpu-site/; nothing that it has is replaced."
    sys.path.insert(0, str(SITE))
    wheels = {
        file.name.split("-")[0].replace("_", "-").lower(): file
        for file in sorted((bundle / "wheels").glob("*.whl"))
    }
    lacking = absent(wheels)
    if lacking:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--disable-pip-version-check",
            "--target",
            SITE,
        ]
        subprocess.run([*command, *(wheels[name] for name in lacking)], check=True)
        importlib.invalidate_caches()
    missing = absent(needed())
    if {"torchvision", "numpy", "pillow"} & {*missing}:
        raise SystemExit(
            f"Missing: {', '.join(missing)}. Install torchvision, of the build of your PyTorch;"
            " numpy and pillow come with it."
        )
    if missing:
        raise SystemExit(
            f"Missing: {', '.join(missing)}. Install them, or run `make gpu-bundle` where there is"
            f" a network and put its gpu-bundle/ into {bundle}."
        )


def unpack(bundle: Path) -> Path | None:
    "The folder of the bundle's pictures, each archive unpacked once; None without pictures."
    from rotvq.run.data import unpack as unpack_safely  # what it needs is there now

    archives = sorted(bundle.glob("pictures-*.tar.xz"))
    for archive in archives:
        done = ROOT / "data" / f".{archive.name}-{archive.stat().st_size}"
        if done.exists():
            continue
        unpack_safely(archive, ROOT / "data")
        done.touch()
    about = bundle / "bundle.json"
    return (
        ROOT / "data" / json.loads(about.read_text(encoding="utf-8"))["folder"]
        if archives and about.exists()
        else None
    )


# The parts


def commands(out: Path, device: str, rehearse: bool, args) -> dict[str, list]:
    "What each part runs."

    def script(name, *more):
        return [sys.executable, ROOT / "benchmarks" / f"{name}.py", *more]

    tiny = ["--rehearse"] if rehearse else []
    preset = "smoke" if rehearse else args.preset
    inner = lambda part, *more: script(
        "gpu_check", "--part", part, "--device", device, "--preset", preset, "--out", out, *more
    )
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "at_once",
        "--traceback-file",
        out / "tests.txt",
        "tests/test_cuda.py",
    ]
    return {
        "tests": pytest,
        "layer": script(
            "quantizer",
            "--device",
            device,
            "--only-shapes",
            "--rounds",
            "2" if rehearse else "9",
            *tiny,
            "--out",
            out / "quantizer.json",
        ),
        "kernels": script("kernels", *tiny, "--out", out / "kernels.json"),
        "step": script(
            "step",
            "--device",
            device,
            "--preset",
            preset,
            "--rounds",
            "2" if rehearse else "15",
            "--out",
            out / "step.json",
        ),
        "steps": inner("steps", "--steps", "3" if rehearse else "200"),
        "together": script(
            "many_trainings",
            *tiny,
            "--seconds",
            "60" if rehearse else "20",
            "--speed",
            out / "together.json",
        ),
        "run": inner("run", "--runs", args.runs.resolve()),
    }


def steps(device: str, preset: str, count: int, out: Path) -> None:
    """Two hundred steps one by one, as a replayed graph, and compiled: speed, memory against the
    plan, whether a step waits; and a profile."""
    import torch

    from measure import machine
    from rotvq.run.training import PRESETS

    result = {"machine": machine(device), "preset": preset, "count": count}

    def one(**changes) -> dict:
        config = dataclasses.replace(PRESETS[preset], **changes)
        learner, step = begun(config, torch.device(device))
        found = counted(learner, step, config, device, count)
        if changes == forms["eager"]:
            result["profile"] = profiled(step, device)
        return found

    forms = {
        "eager": {"replay": False},
        "replayed": {"replay": True},
        "compiled": {"compile": True},
    }
    for name, changes in forms.items():
        result[name] = one(**changes)
        (out / "steps.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = [name for name in forms if not result[name]["ok"]]
    if failed:
        raise SystemExit(f"the loss did not fall: {failed}")


def begun(config, device):
    """A learner after twelve steps (of which the tenth looked at λ, and the last was captured, if
    any is), and a call that takes one more."""
    import torch

    from rotvq.run.data import SAMPLE, ImageNet10
    from rotvq.run.training import Learner, batches, place

    images = place(
        ImageNet10("train", config.size, SAMPLE, 1024 if device.type == "cuda" else 64).images,
        device,
    )
    learner = Learner(config, "rotation", 0, device)
    learner.begin(0)
    x = next(batches(images, config, 0, 0, device))
    losses = [learner.step(x)[0] for _ in range(12)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    learner.first, learner.pictures = losses[0].item(), len(images)
    return learner, lambda: learner.step(x)[0]


def counted(learner, step, config, device: str, count: int) -> dict:
    import torch

    from rotvq.run.plan import least_seconds, plan

    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        loss = step()
    if cuda:
        torch.cuda.synchronize()
    seconds, last = (time.perf_counter() - began) / count, loss.item()
    expected = plan(config, learner.pictures)
    captured = learner.replayed is not None and learner.replayed.replay is not None
    return {
        "ok": last < learner.first and captured == (cuda and config.replay and not config.compile),
        "seconds a step": seconds,
        "pictures a second": config.batch / seconds,
        "least seconds": least_seconds(expected, torch.cuda.get_device_name() if cuda else ""),
        "planned bytes": expected.memory,
        "peak bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "loss": [learner.first, last],
    }


def profiled(step, device: str, count: int = 5) -> dict:
    "Where the time of the device goes, by operator."
    import torch

    kinds = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []),
    ]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(count):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    own = lambda e: (
        getattr(e, "self_device_time_total" if device == "cuda" else "self_cpu_time_total")
        / 1e3
        / count
    )
    events, kind = profile.key_averages(), torch.autograd.DeviceType
    operators = sorted(
        (e for e in events if e.device_type == kind.CPU and re.fullmatch(r"\w+::\w+", e.key)),
        key=own,
        reverse=True,
    )
    rows = [
        {"name": e.key, "ms_a_step": round(own(e), 3), "calls_a_step": e.count / count}
        for e in operators[:12]
    ]
    # of the kernels; an annotation is a span over several
    busy = sum(
        own(e)
        for e in events
        if e.device_type == (kind.CUDA if device == "cuda" else kind.CPU)
        and not getattr(e, "is_user_annotation", False)
    )
    return {"steps": count, "device_ms_a_step": round(busy, 3), "rows": rows}


def run(device: str, preset: str, runs: Path, out: Path) -> None:
    "Epochs of the four models of the full run, until a signal; the next check goes on from there."
    import torch

    from rotvq.run.data import Source, imagenet10
    from rotvq.run.records import Stopped
    from rotvq.run.training import PRESETS, train

    def too_soon(*_):
        raise SystemExit(NO_TIME)

    signal.signal(signal.SIGTERM, too_soon)  # before the training listens itself
    source = imagenet10(os.environ.get("ROTVQ_DATA"), download=False)
    config, folder = (
        dataclasses.replace(PRESETS[preset], switch=1 if preset == "smoke" else 5),
        runs / f"gpu-check-{preset}-{source.name}",
    )
    print(f"pictures: {source.name}, {source.root}", flush=True)
    try:
        train(
            config,
            ("ste", "rotation", "rotation-then-ste", "rotation-until-used"),
            Source(source.root, source.name),
            folder,
            resume="auto",
            device=torch.device(device),
            quiet=True,
        )
    except Stopped as stopped:
        print(f"stopped in {stopped}", flush=True)
    finally:
        if (folder / "metrics.jsonl").exists():
            shutil.copy(folder / "metrics.jsonl", out / "metrics.jsonl")
    if not (folder / "metrics.jsonl").exists():
        raise SystemExit(NO_TIME)


# All of them


class Report:
    "report.json, written anew after each part."

    def __init__(self, out: Path, about: dict):
        self.file, self.held = out / "report.json", about | {"parts": {}}

    def add(self, part: str, found: dict) -> None:
        self.held["parts"][part] = found
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.held, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.file)

    @property
    def ok(self) -> bool:
        begun = [part for part in self.held["parts"].values() if part["began"]]
        return bool(begun) and all(part["ok"] for part in begun)


def carried_out(command: list, limit: float, log, environment: dict) -> dict:
    """Exit status and seconds of a process and all that it started; at its limit it is asked to
    stop, and ended ten seconds later."""
    began = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    found = {"began": True, "limit": round(limit)}
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        found["stopped"] = "at its limit"
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            found["stopped"] = "killed ten seconds after its limit"
    finally:
        if hasattr(os, "killpg"):
            try:
                os.killpg(process.pid, signal.SIGKILL)  # what it has left running
            except ProcessLookupError:
                pass
    return found | {"status": process.wait(), "seconds": round(time.monotonic() - began, 1)}


def measured(part: str, out: Path) -> dict:
    "Where the result of a part is, or the result itself."
    files = {
        "tests": "tests.txt",
        "layer": "quantizer.json",
        "kernels": "kernels.json",
        "step": "step.json",
        "steps": "steps.json",
        "run": "metrics.jsonl",
        "together": "together.json",
    }
    file = out / files[part]
    if not file.exists():
        return {}
    if part == "together":  # a line, which needs no file of its own
        held = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        return {"result": held}
    if part != "run":
        return {"file": file.name}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    print(
        f"    pictures: {rows[0]['data']}, {max(row['epoch'] for row in rows)} epochs", flush=True
    )
    return {
        "file": file.name,
        "pictures": rows[0]["data"],
        "epochs": max(row["epoch"] for row in rows),
    }


def check(args) -> int:
    began = time.monotonic()
    install(args.bundle)
    pictures = unpack(args.bundle)
    import torch

    sys.path.insert(0, str(ROOT))
    from measure import machine, named
    from rotvq.run.records import commit_of

    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "PyTorch sees no CUDA device here. This check is for a machine with one (nvidia-smi,"
            " and a CUDA build of PyTorch); --rehearse shows on a CPU that it runs.",
            file=sys.stderr,
        )
        return 1
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, "together.json"):
        (out / name).unlink(missing_ok=True)  # of an earlier check
    about = args.bundle / "bundle.json"
    report = Report(
        out,
        {
            "machine": machine(device),
            "rehearsal": args.rehearse,
            "minutes": args.minutes,
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit_of(ROOT),
            "bundle": json.loads(about.read_text(encoding="utf-8")) if about.exists() else None,
        },
    )
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [
                str(ROOT),
                str(ROOT / "tests"),
                str(SITE),
                *filter(None, [os.environ.get("PYTHONPATH")]),
            ]
        ),
        "PYTHONUNBUFFERED": "1",
        "KINETO_LOG_LEVEL": "99",
    }
    if pictures:
        environment["ROTVQ_DATA"] = str(pictures)
    if args.rehearse:
        environment |= {
            "ROTVQ_REHEARSE": "1",
            "TRITON_INTERPRET": "1",
            "ROTVQ_DATA": "sample",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        for part, command in commands(out, device, args.rehearse, args).items():
            if args.only and part not in args.only:
                continue
            left = 60 * args.minutes - (time.monotonic() - began)
            most = (
                left
                if LIMITS[part] is None or args.rehearse
                else min(left, LIMITS[part] * args.minutes / 5)
            )  # a CPU may be slow
            if left < LEAST.get(part, 10):
                report.add(part, {"began": False, "why": "no time was left"})
                continue
            print(f"==> {part}, {most:.0f} seconds at most", flush=True)
            print(f"==> {part}", file=log, flush=True)
            found = carried_out(command, most if part != "run" else most - 10, log, environment)
            if part == "run" and found["status"] == NO_TIME:
                report.add(part, found | {"began": False, "why": "no time for an epoch"})
                print("    no time for an epoch", flush=True)
                continue
            report.add(part, {"ok": found["status"] == 0} | found | measured(part, out))
            print(
                f"    {'ok' if report.held['parts'][part]['ok'] else 'FAILED'},"
                f" {found['seconds']:.0f}"
                f" s{', stopped ' + found['stopped'] if 'stopped' in found else ''}",
                flush=True,
            )
    print(
        f"{'all parts that began passed' if report.ok else 'NOT ALL PARTS PASSED, OR NONE BEGAN'};"
        f" {time.monotonic() - began:.0f} s; {out}, {named(report.held['machine'])}"
    )
    return 0 if report.ok else 1


def record(out: Path) -> None:
    """What a check has measured, into nbs/results/ under the name of its GPU, with date and
    version; and the page."""
    from measure import named, page

    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    if report["rehearsal"]:
        raise SystemExit(f"{out} holds a rehearsal, whose numbers mean nothing.")
    held = configparser.ConfigParser(interpolation=None)
    held.read(ROOT / "settings.ini", encoding="utf-8")
    about = {
        "date": report["date"],
        "version": held["DEFAULT"]["version"],
        "commit": report["commit"] or (report["bundle"] or {}).get("commit"),
    }
    for part, kind in {
        "layer": "quantizer",
        "kernels": "kernels",
        "step": "step",
        "steps": "steps",
    }.items():
        if not report["parts"].get(part, {}).get("ok"):
            continue
        found = json.loads((out / f"{kind}.json").read_text(encoding="utf-8"))
        target = ROOT / "nbs" / "results" / f"{kind}_{named(report['machine'])}.json"
        before = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        target.write_text(json.dumps(about | found, indent=1) + "\n", encoding="utf-8")
        replaced = f", in the place of one of {before.get('date', 'another day')}" if before else ""
        print(f"wrote {target}{replaced}")
        if before.get("curves") and not found.get("curves"):
            print("    (that one had curves: `python benchmarks/quantizer.py` measures them)")
    page()


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--minutes", type=float, default=5, help="for all parts together")
    options.add_argument(
        "--rehearse",
        action="store_true",
        help="on a CPU, at tiny sizes, in Triton's interpreter: shows that the check runs",
    )
    options.add_argument("--only", nargs="*", choices=list(LIMITS), help="these parts")
    options.add_argument("--preset", default="cuda", help="of the training steps and the run")
    options.add_argument(
        "--bundle", type=Path, default=ROOT / "gpu-bundle", help="what `make gpu-bundle` made"
    )
    options.add_argument(
        "--out", type=Path, default=ROOT / "gpu-check", help="folder of the results"
    )
    options.add_argument(
        "--runs",
        type=Path,
        default=ROOT / "runs",
        help="folder of the full run, which the next check goes on with",
    )
    options.add_argument(
        "--record",
        action="store_true",
        help="put the results in --out into nbs/results/, and nothing else",
    )
    for name in ("--part", "--device"):
        options.add_argument(name, help=argparse.SUPPRESS)
    options.add_argument("--steps", type=int, default=200, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.record:
        record(args.out)
    elif args.part == "steps":
        steps(args.device, args.preset, args.steps, args.out)
    elif args.part == "run":
        run(args.device, args.preset, args.runs, args.out)
    else:
        return check(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
