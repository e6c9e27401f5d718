"""The kernels for GPUs, without one: in Triton's interpreter, compiled ahead of time, and where
they cannot be trusted."""

import inspect
import json
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch

from helpers import CPU, ROOT
from rotvq.hardware import gpu
from rotvq.layer.gradients import pullback_definition
from rotvq.layer.lookup import best_code_definition, code_sums_definition, lookup_definition
from rotvq.layer.step import gradient_definition, quantize_definition

needs_triton = pytest.mark.skipif(gpu.triton is None, reason="Triton is not installed")


@pytest.mark.slow
@needs_triton
def test_in_the_interpreter():
    """The suites of the estimators and the lookup, and more, with the kernels as operators; in a
    process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/interpreter"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def ahead():
    "benchmarks/ahead_of_time.py"
    if gpu.triton is None or sys.platform != "linux":
        pytest.skip("Triton compiles on Linux")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import ahead_of_time

    if "constexprs" not in inspect.signature(ahead_of_time.ASTSource).parameters:
        pytest.skip("Triton before 3.3 compiles ahead of time in another way")
    return ahead_of_time


SHORT = [f"pullback, d = {d}" for d in (3, 4, 8, 12, 100)]  # a column a lane


@pytest.mark.slow
def test_ahead_of_time_nothing_spills_or_is_fused_across_lanes(ahead):
    """The kernels most used, all for two targets and one in turn for the others; the table, which
    has all of all, is of this source."""
    jobs = (
        "pullback, d = 4",
        "pullback, d = 32",
        "pullback, d = 100",
        "mirror and γ, d = 32, float16",
        "search, d = 16",
    )
    for k, target in enumerate(ahead.TARGETS):
        for job in jobs if target in ("sm_90", "gfx942") else [jobs[k % len(jobs)]]:
            row = ahead.compiled(target, job)
            assert row["spills"] == 0 and row["registers"] <= 255 and row["fused"] == 0, row
            if row["float64"] is not None:
                assert row["float64"] == 0, row


def test_the_committed_table_is_of_these_kernels(ahead):
    held = json.loads((ROOT / "nbs" / "results" / "kernels.json").read_text(encoding="utf-8"))
    assert held["stamp"] == ahead.stamp(), "run benchmarks/ahead_of_time.py"
    assert {(row["target"], row["kernel"]) for row in held["rows"]} == {
        (target, job) for target in ahead.TARGETS for job in ahead.JOBS
    }
    assert not any(row["fused"] for row in held["rows"])
    # a lookup passes over its numbers many times: what a thread puts aside once is no matter there
    assert all(
        row["spills"] <= 32 * row["kernel"].startswith(("step", "lookup", "differences"))
        for row in held["rows"]
    )
    # every length, dtype and form that matters is among them
    assert {job[1:] for job in ahead.JOBS.values() if job[0] == "pullback"} >= {
        (4, torch.bfloat16, False),
        (4, torch.float64, False),
        (4, torch.float16, True),
        *((d, torch.float32, False) for d in (2, 3, 4, 8, 12, 32, 100, 256, 1024)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_fusing_across_lanes_would_be_noticed(ahead, target):
    "The same kernels with fusing allowed, as they were when an H200 refused them."
    for job in (*SHORT, "pullback, d = 4, float64", "mirror and γ, d = 4, float16"):
        assert ahead.compiled(target, job, enable_fp_fusion=True)["fused"] > 5, job
    for job in SHORT:
        assert ahead.compiled(target, job)["fused"] == 0, job


def test_what_counts_as_fused_across_lanes(ahead):
    line = lambda text: f"        /*0010*/                   {text} ;\n"
    shuffle, far = line("SHFL.BFLY PT, R7, R4, 0x2, 0x1f"), line("MOV R7, R9")
    for listing, count in [
        (shuffle + line("FFMA R8, R4, R4, R7"), 1),
        (shuffle + line("FADD R8, R4, R7"), 0),
        (shuffle + line("FFMA R8, R7, R7, R4"), 0),
        (shuffle + far + line("FFMA R8, R4, R4, R7"), 0),
        (shuffle + line("FFMA.FTZ R8, R4, R4, -R7"), 1),
        (shuffle + line("SHFL.BFLY PT, R6, R5, 0x2, 0x1f") + line("DFMA R8, R4, R4, R6"), 1),
        (shuffle + line("@!P0 STG.E [R7.64], R8") + line("FFMA R8, R4, R4, R7"), 1),
    ]:
        assert ahead.fused_across_lanes(listing) == count, listing
    dpp = "\tv_mov_b32_dpp v7, v4 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf\n"
    for listing, count in [
        ("\tv_fma_f32 v8, v4, v4, v7\n", 1),
        ("\tv_fmac_f32_e32 v7, v4, v4\n", 1),
        ("\tv_fmac_f32_e32 v8, v7, v4\n", 0),
        ("\tv_pk_fma_f32 v[8:9], v[4:5], v[4:5], v[6:7]\n", 1),
        ("\tv_add_f32_e32 v7, v4, v7\n\tv_fma_f32 v8, v4, v4, v7\n", 0),
    ]:
        assert ahead.fused_across_lanes(dpp + listing) == count, listing


@pytest.fixture
def forget():
    gpu.verdicts.clear()
    yield
    gpu.verdicts.clear()


def inputs():
    return [*torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0)), None, False]


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_kernel_that_cannot_be_trusted_is_not_used(monkeypatch, forget, fault):
    def bad(*args):
        if fault == "raises":
            raise RuntimeError("no compiler\nand more")
        return pullback_definition(*args) * (1 + 3e-5)

    monkeypatch.setattr(gpu, "triton", gpu.triton or object())
    monkeypatch.setattr(gpu, "launch_pullback", bad)
    args = inputs()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(gpu.pullback_on_gpu(*args), pullback_definition(*args))
    assert (
        len(seen) == 1
        and "definition" in str(seen[0].message)
        and ("no compiler" in str(seen[0].message)) == (fault == "raises")
    )


def test_a_search_that_cannot_be_trusted_is_not_used(monkeypatch, forget):
    monkeypatch.setattr(gpu, "triton", gpu.triton or object())
    monkeypatch.setattr(
        gpu, "launch_search", lambda z, codes, offset: torch.zeros(len(z), dtype=torch.int64)
    )
    z, codes = torch.randn(100, 8), torch.randn(30, 8)
    with pytest.warns(UserWarning, match="search_agrees"):
        found = gpu.best_code_on_gpu(z, codes, torch.zeros(30), 2**20)
    assert torch.equal(found, best_code_definition(z, codes, torch.zeros(30), 2**20))


@pytest.mark.parametrize("bits", [8, 11])
def test_a_search_that_rounds_its_products_is_noticed(monkeypatch, bits):
    "bfloat16 has 8 bits, TF32 has 11."

    def rounded(x):
        step = 2.0 ** (x.abs().clamp_min(1e-30).log2().floor() - bits + 1)
        return (x / step).round() * step

    monkeypatch.setattr(
        gpu,
        "launch_search",
        lambda z, codes, offset: best_code_definition(rounded(z), rounded(codes), offset, 2**20),
    )
    for d in (4, 32):
        assert not gpu.search_agrees(d, "cpu")
    monkeypatch.setattr(
        gpu,
        "launch_search",
        lambda z, codes, offset: best_code_definition(z, codes, offset, 2**20),
    )
    for d in (1, 4, 32):
        assert gpu.search_agrees(d, "cpu")


def test_a_kernel_that_fails_at_one_length_only_is_not_used_there(monkeypatch, forget):
    def launch(g, *rest):
        if g.shape[-1] == 7:
            raise RuntimeError("no such kernel")
        return pullback_definition(g, *rest)

    monkeypatch.setattr(gpu, "triton", gpu.triton or object())
    monkeypatch.setattr(gpu, "launch_pullback", launch)
    gpu.pullback_on_gpu(*torch.randn(3, 5, 8), None, False)
    with pytest.warns(UserWarning, match="no such kernel"):
        gpu.pullback_on_gpu(*torch.randn(3, 5, 7), None, False)


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch, forget):
    monkeypatch.setattr(gpu, "triton", gpu.triton or object())
    monkeypatch.setattr(gpu, "launch_pullback", pullback_definition)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    args = gpu.pullback_agrees, 8, torch.float32, torch.device("cpu")
    assert not gpu.trusted(*args) and not gpu.verdicts
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gpu.trusted(*args)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu.trusted(*args)


def test_which_search_is_taken():
    assert (
        gpu.prefers_kernel(64 * 108, 16, 108)
        and not gpu.prefers_kernel(64 * 108, 17, 108)
        and not gpu.prefers_kernel(4096, 16, 108)
    )


@pytest.fixture
def unknown(monkeypatch, tmp_path):
    "No form has been timed yet."
    monkeypatch.setenv("ROTVQ_CACHE", str(tmp_path))
    gpu.choices.clear()
    yield tmp_path / "gpu.json"
    gpu.choices.clear()


def forms(calls):
    return {
        "slow": lambda: calls.append("slow") or time.sleep(0.002),
        "fast": lambda: calls.append("fast"),
    }


def test_the_faster_form_is_found_once_and_kept_on_disk(unknown):
    calls = []
    assert gpu.faster("x", forms(calls), CPU) == "fast" and set(calls) == {"slow", "fast"}
    assert (
        json.loads(unknown.read_text()) == {"x": "fast"}
        and len(list(unknown.parent.iterdir())) == 1
    )
    calls.clear()
    assert gpu.faster("x", forms(calls), CPU) == "fast" and not calls
    gpu.choices.clear()  # another process reads it
    assert gpu.faster("x", forms(calls), CPU) == "fast" and not calls
    assert gpu.faster("y", forms(calls), CPU) == "fast" and calls
    assert json.loads(unknown.read_text()) == {"x": "fast", "y": "fast"}


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"x": "a form that was"}', '{"x": 3}'])
def test_a_damaged_file_of_choices_is_measured_again(unknown, content):
    unknown.write_text(content)
    assert (
        gpu.faster("x", forms([]), CPU) == "fast" and json.loads(unknown.read_text())["x"] == "fast"
    )


def test_choices_that_cannot_be_written_hold_for_the_process(unknown, monkeypatch):
    (unknown.parent / "a file").write_text("")
    monkeypatch.setenv("ROTVQ_CACHE", str(unknown.parent / "a file"))
    calls = []
    for _ in range(2):
        assert gpu.faster("x", forms(calls), CPU) == "fast"
    assert calls.count("fast") == 9


def test_nothing_is_timed_where_that_was_turned_off(unknown, monkeypatch):
    calls = []
    monkeypatch.setenv("ROTVQ_MEASURE", "0")
    assert gpu.faster("x", forms(calls), CPU) == "slow" and not calls  # the first named
    monkeypatch.delenv("ROTVQ_MEASURE")
    torch.use_deterministic_algorithms(True)
    try:
        assert gpu.faster("x", forms(calls), CPU) == "slow" and not calls
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert (
        gpu.faster("x", forms(calls), torch.device("cuda")) == "slow"
        and not calls
        and not unknown.exists()
    )


@pytest.mark.parametrize("choice", ["in parts", "one kernel"])
def test_the_lookup_takes_the_form_that_was_faster(unknown, monkeypatch, forget, choice):
    "Long vectors, a cosine and float64 go in parts and ask nothing."
    launched = []
    monkeypatch.setattr(gpu, "trusted", lambda *args: True)
    monkeypatch.setattr(
        gpu,
        "launch_lookup",
        lambda z, codes: launched.append(1) or lookup_definition(z, codes, "euclidean", 2**20),
    )
    monkeypatch.setattr(
        gpu, "faster", lambda question, forms, device: asked.append(question) or choice
    )
    asked, z, codes = [], torch.randn(70, 8), torch.randn(9, 8)
    exact = torch.cdist(z, codes).argmin(1)
    assert torch.equal(gpu.lookup_on_gpu(z, codes, "euclidean", 2**20), exact)
    assert asked == ["lookup of 128, 8, 16 on a CPU"] and len(launched) == (choice == "one kernel")
    gpu.lookup_on_gpu(z, codes, "cosine", 2**20)
    gpu.lookup_on_gpu(z.double(), codes.double(), "euclidean", 2**20)
    gpu.lookup_on_gpu(z[:0], codes, "euclidean", 2**20)
    gpu.lookup_on_gpu(torch.randn(5, 65), torch.randn(4, 65), "euclidean", 2**20)
    assert len(asked) == 1


@pytest.mark.parametrize("choice", ["in parts", "one kernel"])
def test_a_step_takes_the_form_that_was_faster(unknown, monkeypatch, forget, choice):
    "What is timed adds to sums of its own; what does not fit goes in parts and asks nothing."
    launched = []

    def whole(z, codes, commitment, sums, ticket):
        launched.append(1)
        return quantize_definition(z, codes, "euclidean", 2**20, commitment, sums, ticket)

    def faster(question, forms, device):
        asked.append(question)
        for form in forms.values():
            form()
        return choice

    monkeypatch.setattr(gpu, "trusted", lambda *args: True)
    monkeypatch.setattr(gpu, "launch_quantize", whole)
    monkeypatch.setattr(gpu, "faster", faster)
    asked, z, codes = [], torch.randn(70, 8), torch.randn(9, 8)
    sums = torch.zeros(9, 9, dtype=torch.float64)
    step = lambda z, codes, distance, sums: gpu.quantize_on_gpu(
        z, codes, distance, 2**20, 0.5, sums, None
    )
    indices = step(z, codes, "euclidean", sums)[2]
    assert torch.equal(indices, torch.cdist(z, codes).argmin(1)) and torch.equal(
        sums, code_sums_definition(z, indices, 9).double()
    )
    assert asked == ["step of 128, 8, 16 on a CPU"] and len(launched) == 1 + (
        choice == "one kernel"
    )
    step(z, codes, "euclidean", None)
    assert len(asked) == 2
    (
        step(z, codes, "cosine", sums),
        step(z.double(), codes.double(), "euclidean", sums),
        step(z[:0], codes, "euclidean", sums),
    )
    step(torch.randn(5, 65), torch.randn(4, 65), "euclidean", None)
    assert len(asked) == 2


def test_gradients_that_do_not_fit_are_left_to_the_definition(monkeypatch, forget):
    monkeypatch.setattr(gpu, "launch_gradient", lambda *args: 1 / 0)
    monkeypatch.setattr(gpu, "trusted", lambda *args: True)
    for d, dtype in ((gpu.LONGEST + 1, torch.float32), (3, torch.float64)):
        g, z, q = torch.randn(3, 4, d, dtype=dtype)
        args = g, torch.ones((), dtype=dtype), z, q, None, True, False, 0.5
        assert torch.equal(gpu.gradient_on_gpu(*args), gradient_definition(*args))
    with pytest.raises(ZeroDivisionError):
        gpu.gradient_on_gpu(
            *torch.randn(1, 4, 3), torch.ones(()), *torch.randn(2, 4, 3), None, True, False, 0.5
        )


def test_sums_and_averages_that_do_not_fit_are_left_to_the_definition(monkeypatch, forget):
    """An order that is asked for; codes in half precision or float64, a cosine, and what does not
    lie in one piece."""
    monkeypatch.setattr(gpu, "launch_sums", lambda *args: 1 / 0)
    monkeypatch.setattr(gpu, "launch_average", lambda *args: 1 / 0)
    monkeypatch.setattr(gpu, "trusted", lambda *args: True)
    z, indices = torch.randn(20, 3), torch.randint(-1, 5, (20,))
    torch.use_deterministic_algorithms(True)
    try:
        batch = gpu.sums_on_gpu(z, indices, 5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(batch, code_sums_definition(z, indices, 5))
    counts, idle = torch.ones(5), torch.zeros(5).long()

    def step(codes, distance="euclidean"):
        return gpu.average_on_gpu(
            codes,
            counts,
            torch.randn(5, 3),
            idle,
            idle.clone(),
            torch.tensor(0),
            batch.clone(),
            0.8,
            distance,
        )  # which is used up

    for codes in (torch.randn(5, 3).half(), torch.randn(5, 3).double(), torch.randn(3, 5).T):
        assert step(codes)
    assert step(torch.randn(5, 3), "cosine")
    with pytest.raises(ZeroDivisionError):
        step(torch.randn(5, 3))


def test_kernels_can_be_turned_off(monkeypatch, forget):
    monkeypatch.setenv("ROTVQ_KERNELS", "0")
    monkeypatch.setattr(gpu, "launch_pullback", lambda *args: 1 / 0)
    assert torch.equal(gpu.pullback_on_gpu(*inputs()), pullback_definition(*inputs()))


def test_rows_that_are_too_long_are_left_to_the_definition(monkeypatch, forget):
    monkeypatch.setattr(gpu, "launch_pullback", lambda *args: 1 / 0)
    g, z, q = torch.randn(3, 2, gpu.LONGEST + 1)
    assert torch.equal(
        gpu.pullback_on_gpu(g, z, q, None, False), pullback_definition(g, z, q, None, False)
    )


@pytest.mark.slow
def test_without_triton():
    "Macs, Windows and CPU builds of PyTorch have none."
    code = """
import sys
sys.modules["triton"] = None
import torch, rotvq
from rotvq.hardware import gpu
assert gpu.triton is None and not gpu.trusted(gpu.search_agrees, 4, "cpu")
vq = rotvq.VectorQuantizer(4, 8, channel_first=False)
z = torch.randn(5, 4, requires_grad=True)
q, _, loss = vq(z)
(q.sum() + loss).backward()
assert z.grad.isfinite().all()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_products_are_not_rounded_on_a_gpu_either(monkeypatch, forget):
    seen = []
    monkeypatch.setattr(
        gpu,
        "best_code_definition",
        lambda *args: seen.append(precision()) or best_code_definition(*args),
    )
    precision = lambda: (
        getattr(torch.backends.cuda.matmul, "fp32_precision", None)
        or torch.get_float32_matmul_precision()
    )
    torch.set_float32_matmul_precision("high")
    try:
        gpu.best_code_on_gpu(torch.randn(5, 100), torch.randn(4, 100), torch.zeros(4), 2**20)
        assert seen == [
            "ieee" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "highest"
        ]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
