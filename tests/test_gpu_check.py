"""The check for a GPU, rehearsed on a CPU: all its parts, its exit status, its time limits, and the
bundle for a machine without network."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT
from rotvq.hardware import gpu
from rotvq.run.data import SAMPLE, list_pictures

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
import gpu_bundle
import gpu_check

pytestmark = pytest.mark.slow

needs_triton = pytest.mark.skipif(gpu.triton is None, reason="Triton is not installed")


def checked(project: Path, out: Path, *options, **environment) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        project / "benchmarks" / "gpu_check.py",
        "--out",
        out,
        "--runs",
        out.parent / "runs",
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@needs_triton
def test_the_rehearsal(tmp_path):
    "In ten minutes: a part that was not done by then would have failed."
    done = checked(ROOT, tmp_path / "out", "--rehearse", "--minutes", "10")
    log = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr + log[-5000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert list(report["parts"]) == list(gpu_check.LIMITS) and report["rehearsal"]
    for name, part in report["parts"].items():
        assert part["ok"] and part["began"] and part["status"] == 0 and "stopped" not in part, name
    assert (
        report["parts"]["together"]["result"]["pictures_per_second"]
        and report["parts"]["run"]["pictures"] == "sample"
        and report["parts"]["run"]["epochs"] == 2
    )
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(gpu_check.FILES) and len(
        gpu_check.FILES
    ) <= 8
    counts = (tmp_path / "out" / "tests.txt").read_text(encoding="utf-8")
    assert counts.strip().endswith("passed, 0 failed, 0 skipped") and int(counts.split()[0]) > 40
    held = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("quantizer", "kernels", "step", "steps")
    }
    assert (
        len(held["quantizer"]["shapes"]) == 2
        and held["kernels"]["search"]
        and held["kernels"]["host"]
        and held["step"]["results"]
    )
    assert (
        all(held["steps"][form]["ok"] for form in ("eager", "replayed", "compiled"))
        and held["steps"]["profile"]["rows"]
    )
    assert len((tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    with pytest.raises(SystemExit, match="rehearsal"):
        gpu_check.record(tmp_path / "out")


@needs_triton
def test_one_broken_test_is_enough(tmp_path):
    "Its traceback is kept, the next part runs all the same, and the exit status is not 0."
    project = tmp_path / "project"
    for name in ("benchmarks", "tests"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "rotvq").symlink_to(ROOT / "rotvq")
    shutil.copy(ROOT / "settings.ini", project)
    with open(project / "tests" / "test_cuda.py", "a", encoding="utf-8") as file:
        file.write(
            "\n\ndef test_broken_on_purpose():\n    one, two = 1, 2\n    assert one == two\n"
        )
    done = checked(
        project,
        tmp_path / "out",
        "--rehearse",
        "--only",
        "tests",
        "step",
        PYTEST_ADDOPTS="-k 'broken_on_purpose or stopwatch'",
    )
    assert done.returncode == 1 and "NOT ALL" in done.stdout, done.stdout + done.stderr
    parts = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["parts"]
    assert [part["ok"] for part in parts.values()] == [False, True]
    said = (tmp_path / "out" / "tests.txt").read_text(encoding="utf-8")
    assert (
        "FAILED tests/test_cuda.py::test_broken_on_purpose" in said
        and "assert one == two" in said
        and "2 passed" not in said
        and "1 passed, 1 failed" in said
    )


def test_without_time_nothing_begins_and_that_is_no_success(tmp_path):
    done = checked(ROOT, tmp_path / "out", "--rehearse", "--minutes", "0.1")
    parts = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["parts"]
    assert (
        done.returncode == 1
        and "NONE BEGAN" in done.stdout
        and not any(part["began"] for part in parts.values())
    )


def test_without_a_gpu_it_says_so(tmp_path):
    done = checked(ROOT, tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert (
        done.returncode == 1
        and "no CUDA device" in done.stderr
        and "--rehearse" in done.stderr
        and not (tmp_path / "out").exists()
    )


def test_a_part_ends_at_its_limit_with_all_that_it_started(tmp_path):
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, lambda *_:"
        " sys.exit(0)); subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        " print('here', flush=True); time.sleep(60)"
    )
    with open(tmp_path / "log", "w") as log:
        found = gpu_check.carried_out([sys.executable, "-c", stubborn], 2, log, dict(os.environ))
        quick = gpu_check.carried_out(
            [sys.executable, "-c", "raise SystemExit(3)"], 30, log, dict(os.environ)
        )
    assert (
        found["stopped"] == "at its limit" and found["status"] == 0 and 2 <= found["seconds"] < 12
    )
    assert "stopped" not in quick and quick["status"] == 3
    time.sleep(0.2)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "import time; time.sleep(60)" not in left.replace(stubborn, "")


def test_the_report_is_whole_after_each_part(tmp_path):
    report = gpu_check.Report(tmp_path, {"minutes": 5})
    assert not report.ok  # nothing has begun
    report.add("tests", {"began": True, "ok": True})
    report.add("run", {"began": False, "why": "no time was left"})
    assert report.ok and list(json.loads((tmp_path / "report.json").read_text())["parts"]) == [
        "tests",
        "run",
    ]
    report.add("layer", {"began": True, "ok": False})
    assert not report.ok


def test_results_are_recorded_under_the_name_of_the_gpu(tmp_path):
    """And the page is made with them: here of a GPU whose rates nobody has entered, with the files
    of an H200 as its results."""
    project, results = tmp_path / "project", tmp_path / "project" / "nbs" / "results"
    for name in ("benchmarks", "tools"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "nbs" / "results", results)
    (project / "nbs" / "images").mkdir()
    shutil.copy(ROOT / "settings.ini", project)
    machine = {"device": "cuda", "name": "NVIDIA B200 (180 GB)", "torch": "2.99", "threads": 4}
    parts = {"layer": "quantizer", "kernels": "kernels", "step": "step", "steps": "steps"}
    report = {
        "machine": machine,
        "rehearsal": False,
        "date": "2026-01-02",
        "commit": None,
        "bundle": {"commit": "abc"},
        "parts": {part: {"began": True, "ok": part != "step"} for part in parts},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    for kind in parts.values():
        held = json.loads((results / f"{kind}_nvidia-h200.json").read_text(encoding="utf-8"))
        held = {
            key: value for key, value in held.items() if key not in ("date", "version", "note")
        } | {"machine": machine}
        if kind == "steps":
            held["eager"]["least seconds"] = held["compiled"]["least seconds"] = None
        if kind == "quantizer":
            held["curves"] = {}
        (tmp_path / f"{kind}.json").write_text(json.dumps(held))
    record = lambda: subprocess.run(
        [sys.executable, project / "benchmarks" / "gpu_check.py", "--record", "--out", tmp_path],
        capture_output=True,
        text=True,
    )
    done = record()
    assert done.returncode == 0, done.stderr
    found = sorted(file.name for file in results.glob("*b200*"))
    assert found == [
        f"{kind}_nvidia-b200-180-gb.json" for kind in ("kernels", "quantizer", "steps")
    ]  # not of the part that failed
    held = json.loads((results / found[0]).read_text(encoding="utf-8"))
    assert held["date"] == "2026-01-02" and held["commit"] == "abc" and held["version"]
    report["parts"]["step"]["ok"] = True
    (tmp_path / "report.json").write_text(json.dumps(report))
    done = record()
    page = (project / "nbs" / "benchmarks.qmd").read_text(encoding="utf-8")
    assert done.returncode == 0 and "in the place of one of 2026-01-02" in done.stdout, done.stderr
    assert (
        "On an NVIDIA B200 (180 GB)" in page
        and "{#steps-nvidia-b200-180-gb}" in page
        and "On an NVIDIA H200" in page
    )


def test_pictures_travel_byte_for_byte_in_archives_that_are_a_fair_half_each(tmp_path, monkeypatch):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    assert gpu_bundle.byte_for_byte(SAMPLE.root, bundle, 0.2e6) == "imagenet10"
    archives = sorted(bundle.glob("*.xz"))
    assert len(archives) == 2 and all(file.stat().st_size <= 0.2e6 for file in archives)
    (bundle / "bundle.json").write_text('{"folder": "imagenet10"}')
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    second = archives[1].rename(tmp_path / "later")
    folder = gpu_check.unpack(bundle)
    assert folder == tmp_path / "data" / "imagenet10" and 3 <= len(list(folder.rglob("*.jpg"))) <= 5
    second.rename(archives[1])
    gpu_check.unpack(bundle)
    for split in ("train", "val"):
        for file in list_pictures(SAMPLE.root, split)[0]:
            assert (folder / file.relative_to(SAMPLE.root)).read_bytes() == file.read_bytes()
    assert gpu_check.unpack(tmp_path / "nowhere") is None


def test_smaller_pictures_are_labelled(tmp_path):
    folder = gpu_bundle.reencoded(SAMPLE.root, tmp_path, 0.1e6, 64)
    assert (
        folder.startswith("imagenet10-64px-q")
        and (tmp_path / "pictures-1.tar.xz").stat().st_size < 0.1e6
    )


def test_packages_that_are_missing_come_from_the_bundle(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "SITE", tmp_path / "site")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(gpu_check, "needed", lambda: ["numpy", "rotvq-absent"])
    with pytest.raises(SystemExit, match="rotvq-absent.*make gpu-bundle"):
        gpu_check.install(tmp_path)
    (tmp_path / "wheels").mkdir()
    for name in ("rotvq_absent", "numpy"):  # the second is here already, and stays as it is
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-9.9-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "here = True\n")
            wheel.writestr(
                f"{name}-9.9.dist-info/METADATA",
                f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n",
            )
            wheel.writestr(
                f"{name}-9.9.dist-info/WHEEL",
                "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            wheel.writestr(f"{name}-9.9.dist-info/RECORD", "")
    gpu_check.install(tmp_path)
    assert sorted(file.name for file in (tmp_path / "site").glob("*.py")) == ["rotvq_absent.py"]


def test_what_the_bundle_takes_along():
    names = gpu_bundle.closure(
        gpu_check.needed(), "3.12", set(gpu_bundle.closure(gpu_bundle.BROUGHT, "3.12"))
    )
    assert {
        "tyro",
        "platformdirs",
        "vector-quantize-pytorch",
        "pytest",
        "hypothesis",
        "safetensors",
    } <= set(names)
    assert not {"torch", "numpy", "pillow", "nbdev", "jupyterlab"} & set(names) and not [
        name for name in names if name.startswith("nvidia")
    ]
    for name in gpu_bundle.SOURCES:
        assert (ROOT / name).exists(), name
