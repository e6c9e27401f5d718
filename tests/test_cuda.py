"""What differs on a GPU: the same answers as on the CPU, and a run with mixed precision.
`pretend.py` rehearses these tests without one."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

import pretend  # makes benchmarks/ importable, too
from pretend import GPU, REHEARSED
from rotvq import VectorQuantizer, reflection_trick, rotation_trick, straight_through
from rotvq.hardware import gpu
from rotvq.layer.gradients import pullback, pullback_definition
from rotvq.layer.lookup import best_code_definition, nearest_code
from rotvq.run.data import SAMPLE, ImageNet10
from rotvq.run.training import (
    PRESETS,
    Learner,
    Stopwatch,
    batches,
    evaluate,
    find_preset,
    rate,
    train,
)
from test_estimators import at_angle, explicit, gradient, relative_error
from test_quantizer import OPTIONS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not REHEARSED, reason="no CUDA device"
)
needs_triton = pytest.mark.skipif(gpu.triton is None, reason="Triton is not installed")
ROWS = 20 if REHEARSED else 500  # the interpreter takes a millisecond for a row


def some(*cases) -> list:
    "In a rehearsal the first and the last: it looks for wrong names and shapes, not for numbers."
    return [cases[0], cases[-1]] if REHEARSED else list(cases)


@pytest.fixture(scope="module", autouse=True)
def rehearsal():
    if REHEARSED:
        pretend.begin()


@pytest.fixture
def by_definitions(monkeypatch):
    "For whole trainings: in a rehearsal the kernels, tested above, would take most of the time."
    if REHEARSED:
        import interpreter

        monkeypatch.setattr(interpreter, "DEFINITIONS_ONLY", True)


def leaf_on(device, x: torch.Tensor) -> torch.Tensor:
    "A leaf of its own: `x.to(device)` may be `x`, and is none where `x` has a gradient."
    return x.detach().to(device, copy=True).requires_grad_()


@pytest.mark.parametrize("trick", [straight_through, rotation_trick, reflection_trick])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_estimators_equal_the_cpu(trick, dtype):
    z, q, g = torch.randn(3, 1000, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for device in ("cpu", GPU):
        leaf = leaf_on(device, z)
        out = trick(leaf, q.to(device))
        assert out.device.type == torch.device(device).type and torch.equal(out.cpu(), q)
        out.backward(g.to(device))
        results.append(leaf.grad.cpu())
    assert_close(*results, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "d", [4, 33] if REHEARSED else [1, 2, 3, 4, 8, 12, 32, 33, 100, 1000, 4096]
)
def test_the_kernel_of_the_gradient_passes_its_check_and_is_used(d, dtype, monkeypatch):
    assert gpu.pullback_agrees(d, dtype, GPU)
    z, q, g = torch.randn(3, ROWS, d, generator=torch.Generator().manual_seed(d)).to("cuda", dtype)
    scale = torch.rand(ROWS, generator=torch.Generator().manual_seed(d)).to("cuda")
    for mirror in (False, True):
        for gamma in (None, scale):
            right = pullback_definition(g, z, q, gamma, mirror).double()
            error = (pullback(g, z, q, gamma, mirror).double() - right).norm(dim=1) / right.norm(
                dim=1
            )
            assert error.max() < max(1e-6, 2 * torch.finfo(dtype).eps)
    for weight in (
        (torch.arange(ROWS, device="cuda") % 4 / 2).clamp_max(1),
        torch.tensor(0.3, device="cuda").expand(ROWS),
    ):
        right = pullback_definition(g, z, q, None, False, weight).double()
        off = (pullback(g, z, q, None, False, weight).double() - right).norm(dim=1)
        assert (off / right.norm(dim=1).maximum(g.double().norm(dim=1))).max() < max(
            1e-6, 2 * torch.finfo(dtype).eps
        )
    launches = []
    monkeypatch.setattr(
        gpu, "launch_pullback", lambda *args: launches.append(args) or args[0].clone()
    )
    pullback(g, z, q, None, False)
    assert len(launches) == 1


@needs_triton
@pytest.mark.parametrize("d, K", some((1, 1), (3, 100), (16, 1000), (32, 1000), (32, 257)))
def test_the_search_kernel_finds_the_lowest_of_equals(d, K):
    assert gpu.search_agrees(d, GPU)
    gen = torch.Generator().manual_seed(d)
    z, codes = (
        torch.randint(-2, 3, (n, d), generator=gen).float().to("cuda") for n in (2 * ROWS, K)
    )
    for far in (0, 2049):  # of which TF32 would lose the last bit
        offset = -0.5 * codes.square().sum(1) * (far == 0)
        exact = best_code_definition(z.double(), codes.double() + far, offset.double(), 2**20)
        assert torch.equal(gpu.launch_search(z, codes + far, offset), exact)


@needs_triton
@pytest.mark.parametrize(
    "n, d, K", some((1, 1, 1), (5000, 4, 300), (3000, 16, 64), (4000, 33, 1000), (2000, 64, 257))
)
def test_the_kernel_of_the_whole_lookup_finds_the_nearest(n, d, K):
    assert gpu.lookup_agrees(d, GPU)
    n = math.ceil(n / 10) if REHEARSED else n
    for far in (0.0, 100.0):
        z, codes = (
            torch.randn(m, d, generator=torch.Generator().manual_seed(m)) + far for m in (n, K)
        )
        exact = torch.cdist(z.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
        found = exact.gather(1, gpu.launch_lookup(z.to("cuda"), codes.to("cuda")).cpu()[:, None])[
            :, 0
        ]
        assert (found <= exact.amin(1) * (1 + 1e-5) + 1e-6).all()


@needs_triton
@pytest.mark.parametrize("d", [4, 33] if REHEARSED else [1, 4, 33, 256])
def test_the_kernels_of_sums_and_averages_pass_their_checks(d):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert gpu.sums_agree(d, dtype, GPU)
    assert gpu.averages_agree(d, GPU) and gpu.gradients_agree(d, GPU)
    if d <= gpu.LONGEST_LOOKUP:
        assert gpu.quantize_agrees(d, GPU)


@needs_triton
@pytest.mark.parametrize("form", ["in parts", "one kernel"])
def test_a_step_by_either_form_equals_the_cpu(form, monkeypatch):
    """Also many times over: of many programs the last one to finish writes the loss, and takes the
    tickets back."""
    monkeypatch.setattr(gpu, "faster", lambda *args: form)
    torch.manual_seed(0)
    layers = [VectorQuantizer(16, 50, channel_first=False).to(device) for device in ("cpu", GPU)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer in layers:
        layer.learn()
    for _ in range(3 if REHEARSED else 200):
        z, g = torch.randn(2, 4 * ROWS, 16)
        seen = []
        for layer, device in zip(layers, ("cpu", GPU)):
            leaf = leaf_on(device, z)
            q, indices, loss = layer(leaf)
            (q * g.to(device)).sum().add(loss).backward()
            layer.learn()
            seen.append([t.detach().cpu() for t in (q, indices, loss, leaf.grad)])
        same = seen[0][1] == seen[1][1]  # rounding may choose among equals
        assert same.float().mean() > 0.999
        for k in (0, 3):
            assert_close(seen[0][k][same], seen[1][k][same], rtol=1e-3, atol=1e-4)
        assert_close(seen[0][2], seen[1][2], rtol=1e-4, atol=1e-6)
        layers[1].load_state_dict(layers[0].state_dict())
    assert int(layers[1].book.collected["ticket"]) == 0


@needs_triton
@pytest.mark.parametrize("d", [4, 33] if REHEARSED else [1, 4, 33, 256])
def test_groups_far_apart_are_told_apart_by_the_kernel_of_differences(d):
    for dtype in (torch.float32, torch.float64):
        assert gpu.differences_agree(d, dtype, GPU)
    places = 1e3 * torch.randn(3, d, generator=torch.Generator().manual_seed(0))
    z, codes = (
        places.repeat_interleave(n, 0)
        + 0.1 * torch.randn(3 * n, d, generator=torch.Generator().manual_seed(n))
        for n in (ROWS, 40)
    )
    exact = torch.cdist(z.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = exact.gather(1, nearest_code(z.cuda(), codes.cuda()).cpu()[:, None])[:, 0]
    assert (found <= exact.amin(1) * (1 + 1e-3) + 1e-4).all()


@pytest.mark.parametrize("d", some(2, 3, 4, 8, 12, 100))
def test_nearly_opposite_vectors_keep_their_digits(d):
    "Also where a row lies in several lanes, a column in each."
    for k in range(1, 13):
        z, q, g = (v.float() for v in at_angle(k, ROWS, d, math.pi - math.acos(1 - 10.0**-k)))
        ours = gradient(rotation_trick, z.cuda(), q.cuda(), g.cuda()).cpu()
        assert relative_error(ours, explicit("rotation", z, q, g)).max() < 2e-6, (
            k
        )  # a GPU's fast division is wrong by up to two units


def test_nearly_opposite_vectors_keep_their_digits_in_a_compiled_graph():
    compiled = torch.compile(
        rotation_trick, fullgraph=True, **{"backend": "aot_eager"} if REHEARSED else {}
    )
    z, q, g = (v.float() for v in at_angle(0, ROWS, 8, math.pi - 1e-4))
    assert (
        relative_error(
            gradient(compiled, z.cuda(), q.cuda(), g.cuda()).cpu(), explicit("rotation", z, q, g)
        ).max()
        < 2e-6
    )


def test_lookup_and_layer_equal_the_cpu():
    torch.manual_seed(0)
    z, codes = torch.randn(10 * ROWS, 32), torch.randn(1024, 32)
    distances = torch.cdist(z.double(), codes.double())
    chosen = distances.gather(1, nearest_code(z.cuda(), codes.cuda()).cpu()[:, None])[:, 0]
    assert ((chosen - distances.amin(1)) / chosen).max() < 1e-5
    vq = VectorQuantizer(32, 64, init="normal")
    twin = VectorQuantizer(32, 64).cuda()
    twin.load_state_dict(vq.state_dict())
    a, b = vq(z), twin(z.cuda())
    assert torch.equal(a.indices, b.indices.cpu())
    assert_close(vq.codebook, twin.codebook.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [name for name, kw in OPTIONS.items() if "revive_after" not in kw and "init" not in kw],
)
def test_every_kind_of_layer_equals_the_cpu(options):
    gen = torch.Generator().manual_seed(0)
    z, mask = torch.randn(8, 100, 16, generator=gen), torch.rand(8, 100, generator=gen) < 0.8
    torch.manual_seed(0)
    vq = VectorQuantizer(16, 300, init="normal", **OPTIONS[options])
    twin = VectorQuantizer(16, 300, init="normal", **OPTIONS[options]).cuda()
    twin.load_state_dict(vq.state_dict())
    results = []
    for net, device in ((vq, "cpu"), (twin, GPU)):
        leaf = leaf_on(device, z)
        out = net(leaf, mask.to(device))
        (out.q.square().sum() + out.loss).backward()
        of_codes = [p.grad.cpu() for p in net.parameters() if p.grad is not None]
        results.append(
            [
                out.indices.cpu(),
                out.q.detach().cpu(),
                out.loss.detach().cpu(),
                leaf.grad.cpu(),
                *of_codes,
            ]
        )
    assert len(results[0]) == len(results[1]) == (5 if vq.learnable and not vq.frozen else 4)
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1:], results[1][1:], rtol=1e-4, atol=1e-5)
    assert_close(
        dict(vq.state_dict()),
        {k: v.cpu() for k, v in twin.state_dict().items()},
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("learnable", [False, True])
def test_a_training_step_never_waits_for_the_device(learnable):
    K = 64 if REHEARSED else 512
    vq = VectorQuantizer(32, K, learnable=learnable, revive_after=2).cuda()
    z = torch.randn(4, ROWS, 32, device="cuda", requires_grad=True)
    mask = torch.rand(4, ROWS, device="cuda") < 0.8

    def step():
        q, _, loss = vq(z, mask)
        (q.square().sum() + loss).backward()

    step()  # kernels are checked at their first use, which waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_with_mixed_precision_and_its_clock(tmp_path, monkeypatch, by_definitions):
    preset = dataclasses.replace(
        PRESETS["smoke"], name="tiny", limit=16 if REHEARSED else 48, precision="bfloat16"
    )
    run = train(preset, ("ste", "rotation"), SAMPLE, tmp_path / "run", quiet=True)
    again = train(preset, ("ste", "rotation"), SAMPLE, tmp_path / "run", resume=True, quiet=True)
    assert again.rows == run.rows and len(run.rows) == 4
    seconds = {
        name: [row["seconds"] for row in run.rows if row["estimator"] == name]
        for name in run.estimators
    }
    for first, second in seconds.values():
        assert 0 < first < second < 600  # milliseconds, on a GPU
    monkeypatch.delenv("ROTVQ_PRESET")
    assert find_preset("auto").name == GPU.type


def test_the_stopwatch():
    watch = Stopwatch(GPU)
    with watch:
        torch.randn(1000, 1000, device="cuda").mm(torch.randn(1000, 1000, device="cuda"))
    once = watch.read()
    with watch:
        torch.randn(1000, 1000, device="cuda").sum()
    assert 0 < once < watch.read() < 600


@pytest.mark.parametrize("estimator", some("rotation-then-ste", "rotation", "rotation-until-used"))
def test_a_training_of_replayed_graphs_equals_one_step_by_step(estimator, by_definitions):
    """On a GPU each step of `many_trainings.py` is a captured graph; what comes after `-then-` is
    captured anew."""
    from many_trainings import Job, carry_out

    few = 16 if REHEARSED else 64
    config = dataclasses.replace(
        PRESETS["smoke"], limit=few, epochs=3, switch=1, schedule="cosine", warmup=1.0
    )
    pictures = tuple(
        ImageNet10(split, config.size, SAMPLE, config.limit).images.to(GPU)
        for split in ("train", "val")
    )
    job, learner = Job(config, estimator, 0, pictures, GPU), Learner(config, estimator, 0, GPU)
    carry_out([lambda: job], 1, 600)
    for epoch in range(config.epochs):
        learner.begin(epoch)
        for step, x in enumerate(batches(pictures[0], config, 0, epoch, GPU)):
            learner.step(x, rate(config, epoch * job.steps + step, job.steps))
        assert math.isclose(
            evaluate(learner.model, pictures[1])["mse"], job.rows[epoch]["mse"], rel_tol=1e-3
        )
    assert (job.graph is not None) == (GPU.type == "cuda")
    start = Learner(config, estimator, 0, GPU)
    flat = lambda net: torch.cat([p.detach().flatten() for p in net.model.parameters()])
    apart, moved = (
        (flat(job) - flat(learner)).abs().mean(),
        (flat(learner) - flat(start)).abs().mean(),
    )
    assert apart < 0.1 * moved
    assert torch.equal(job.model.quantizer.batches, learner.model.quantizer.batches)
