"""What differs on a GPU: the same answers as on the CPU, and a run with mixed precision."""
import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from rotvq import VectorQuantizer, kernels, reflection_trick, rotation_trick, straight_through
from rotvq.codebook import best_code_definition, nearest_code
from rotvq.data import SAMPLE
from rotvq.rotation import pullback, pullback_definition
from rotvq.training import PRESETS, Stopwatch, find_preset, train
from test_estimators import at_angle, explicit, gradient, relative_error
from test_quantizer import OPTIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("trick", [straight_through, rotation_trick, reflection_trick])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_estimators_equal_the_cpu(trick, dtype):
    z, q, g = torch.randn(3, 1000, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        leaf = z.to(device).requires_grad_()
        out = trick(leaf, q.to(device))
        assert torch.equal(out.cpu(), q)
        results.append(torch.autograd.grad(out, leaf, g.to(device))[0].cpu())
    assert_close(*results, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-4)


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_kernels_pass_their_checks_and_are_used(dtype, monkeypatch):
    for d in (1, 4, 32):
        assert kernels.search_agrees(d, torch.device("cuda")) and kernels.pullback_agrees(d, dtype, torch.device("cuda"))
    for d in (1, 3, 32, 100, 1000, 4096):
        z, q, g = torch.randn(3, 500, d, generator=torch.Generator().manual_seed(d)).to("cuda", dtype)
        for mirror in (False, True):
            for gamma in (None, torch.rand(500, device="cuda")):
                right = pullback_definition(g, z, q, gamma, mirror).double()
                error = (pullback(g, z, q, gamma, mirror).double() - right).norm(dim=1) / right.norm(dim=1)
                assert error.max() < max(1e-6, 2 * torch.finfo(dtype).eps)
    launches = []
    monkeypatch.setattr(kernels, "launch_pullback", lambda *args: launches.append(args) or args[0])
    pullback(g, z, q, None, False)
    assert len(launches) == 1


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("d, K", [(1, 1), (3, 100), (32, 1000), (32, 257)])
def test_the_search_kernel_finds_the_lowest_of_equals(d, K):
    gen = torch.Generator().manual_seed(d)
    z, codes = (torch.randint(-2, 3, (n, d), generator=gen).float().cuda() for n in (1000, K))
    for far in (0, 2049):                                                # of which TF32 would lose the last bit
        offset = -0.5 * codes.square().sum(1) * (far == 0)
        exact = best_code_definition(z.double(), codes.double() + far, offset.double(), 2**20)
        assert torch.equal(kernels.launch_search(z, codes + far, offset), exact)


@pytest.mark.parametrize("compiled", [False, True])
def test_nearly_opposite_vectors_keep_their_digits(compiled):
    trick = torch.compile(rotation_trick, fullgraph=True) if compiled else rotation_trick
    for k in range(1, 13):
        z, q, g = (v.float() for v in at_angle(k, 200, 8, math.pi - math.acos(1 - 10.0**-k)))
        ours = gradient(trick, z.cuda(), q.cuda(), g.cuda()).cpu()
        assert relative_error(ours, explicit("rotation", z, q, g)).max() < 1e-5, k


def test_lookup_and_layer_equal_the_cpu():
    torch.manual_seed(0)
    z, codes = torch.randn(5000, 32), torch.randn(1024, 32)
    distances = torch.cdist(z.double(), codes.double())
    chosen = distances.gather(1, nearest_code(z.cuda(), codes.cuda()).cpu()[:, None])[:, 0]
    assert ((chosen - distances.amin(1)) / chosen).max() < 1e-5
    vq = VectorQuantizer(32, 64, init="normal")
    twin = VectorQuantizer(32, 64).cuda()
    twin.load_state_dict(vq.state_dict())
    a, b = vq(z), twin(z.cuda())
    assert torch.equal(a.indices, b.indices.cpu())
    assert_close(vq.codebook, twin.codebook.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [name for name, kw in OPTIONS.items() if "revive_after" not in kw and "init" not in kw])
def test_every_kind_of_layer_equals_the_cpu(options):
    gen = torch.Generator().manual_seed(0)
    z, mask = torch.randn(8, 100, 16, generator=gen), torch.rand(8, 100, generator=gen) < 0.8
    torch.manual_seed(0)
    vq = VectorQuantizer(16, 300, init="normal", **OPTIONS[options])
    twin = VectorQuantizer(16, 300, init="normal", **OPTIONS[options]).cuda()
    twin.load_state_dict(vq.state_dict())
    results = []
    for net, device in ((vq, "cpu"), (twin, "cuda")):
        leaf = z.to(device).requires_grad_()
        out = net(leaf, mask.to(device))
        (out.q.square().sum() + out.loss).backward()
        results.append([out.indices.cpu(), out.q.detach().cpu(), out.loss.detach().cpu(), leaf.grad.cpu()])
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1:], results[1][1:], rtol=1e-4, atol=1e-5)
    assert_close(vq.state_dict(), {k: v.cpu() for k, v in twin.state_dict().items()}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learnable", [False, True])
def test_a_training_step_never_waits_for_the_device(learnable):
    vq = VectorQuantizer(32, 512, learnable=learnable, revive_after=2).cuda()
    z, mask = torch.randn(4, 500, 32, device="cuda", requires_grad=True), torch.rand(4, 500, device="cuda") < 0.8
    vq(z, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            q, _, loss = vq(z, mask)
            (q.square().sum() + loss).backward()
    finally: torch.cuda.set_sync_debug_mode("default")


def test_a_run_with_mixed_precision_and_its_clock(tmp_path):
    preset = dataclasses.replace(PRESETS["smoke"], name="tiny", limit=48, precision="bfloat16")
    run = train(preset, ("ste", "rotation"), SAMPLE, tmp_path / "run", quiet=True)
    again = train(preset, ("ste", "rotation"), SAMPLE, tmp_path / "run", resume=True, quiet=True)
    assert again.rows == run.rows and all(0 < row["seconds"] < 600 for row in run.rows)
    assert find_preset("auto").name in ("cuda", "smoke")
    watch = Stopwatch(torch.device("cuda"))
    with watch: torch.randn(1000, 1000, device="cuda").mm(torch.randn(1000, 1000, device="cuda"))
    assert watch.read() > 0
