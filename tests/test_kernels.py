"""The kernels for GPUs, without one: in Triton's interpreter, compiled ahead of time, and where they cannot be trusted."""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from rotvq import kernels
from rotvq.codebook import best_code_definition
from rotvq.rotation import pullback_definition

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")


@needs_triton
def test_in_the_interpreter():
    "The suites of the estimators and the lookup, and more, with the kernels as operators; in a process of its own."
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/interpreter"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_ahead_of_time_nothing_spills():
    "The kernels most used, for every target; all of them are in the committed table."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from ahead_of_time import JOBS, TARGETS, compiled
    for target in TARGETS:
        for job in ("pullback, d = 32", "mirror and γ, d = 32, float16", "search, d = 32"):
            row = compiled(target, job)
            assert row["spills"] == 0 and row["registers"] <= 255, row
            if row["float64"] is not None: assert row["float64"] == 0, row
    held = json.loads((ROOT / "nbs" / "results" / "kernels.json").read_text(encoding="utf-8"))
    assert {(row["target"], row["kernel"]) for row in held["rows"]} == {(target, job) for target in TARGETS for job in JOBS}
    assert not any(row["spills"] for row in held["rows"])


@pytest.fixture
def forget():
    kernels.trusted.cache_clear()
    yield
    kernels.trusted.cache_clear()


def inputs(): return [*torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0)), None, False]


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_kernel_that_cannot_be_trusted_is_not_used(monkeypatch, forget, fault):
    def bad(*args):
        if fault == "raises": raise RuntimeError("no compiler\nand more")
        return pullback_definition(*args) * (1 + 3e-5)
    monkeypatch.setattr(kernels, "triton", kernels.triton or object())
    monkeypatch.setattr(kernels, "launch_pullback", bad)
    args = inputs()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3): assert torch.equal(kernels.pullback_on_gpu(*args), pullback_definition(*args))
    assert len(seen) == 1 and "definition" in str(seen[0].message) and ("no compiler" in str(seen[0].message)) == (fault == "raises")


def test_a_search_that_cannot_be_trusted_is_not_used(monkeypatch, forget):
    monkeypatch.setattr(kernels, "triton", kernels.triton or object())
    monkeypatch.setattr(kernels, "launch_search", lambda z, codes, offset: torch.zeros(len(z), dtype=torch.int64))
    z, codes = torch.randn(100, 8), torch.randn(30, 8)
    with pytest.warns(UserWarning, match="search_agrees"):
        found = kernels.best_code_on_gpu(z, codes, torch.zeros(30), 2**20)
    assert torch.equal(found, best_code_definition(z, codes, torch.zeros(30), 2**20))


def test_kernels_can_be_turned_off(monkeypatch, forget):
    monkeypatch.setenv("ROTVQ_KERNELS", "0")
    monkeypatch.setattr(kernels, "launch_pullback", lambda *args: 1 / 0)
    assert torch.equal(kernels.pullback_on_gpu(*inputs()), pullback_definition(*inputs()))


def test_rows_that_are_too_long_are_left_to_the_definition(monkeypatch, forget):
    monkeypatch.setattr(kernels, "launch_pullback", lambda *args: 1 / 0)
    g, z, q = torch.randn(3, 2, kernels.LONGEST + 1)
    assert torch.equal(kernels.pullback_on_gpu(g, z, q, None, False), pullback_definition(g, z, q, None, False))


def test_without_triton():
    "Macs, Windows and CPU builds of PyTorch have none."
    code = """
import sys
sys.modules["triton"] = None
import torch, rotvq
from rotvq import kernels
assert kernels.triton is None and not kernels.trusted(kernels.search_agrees, "cpu")
vq = rotvq.VectorQuantizer(4, 8, channel_first=False)
z = torch.randn(5, 4, requires_grad=True)
q, _, loss = vq(z)
(q.sum() + loss).backward()
assert z.grad.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_products_are_not_rounded_on_a_gpu_either(monkeypatch, forget):
    seen = []
    monkeypatch.setattr(kernels, "best_code_definition", lambda *args: seen.append(precision()) or best_code_definition(*args))
    precision = lambda: getattr(torch.backends.cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        kernels.best_code_on_gpu(torch.randn(5, 100), torch.randn(4, 100), torch.zeros(4), 2**20)
        assert seen == ["ieee" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "highest"]
        assert torch.get_float32_matmul_precision() == "high"
    finally: torch.set_float32_matmul_precision("highest")
