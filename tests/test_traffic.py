"""What a GPU has to launch and to move, counted at the dispatcher by benchmarks/traffic.py."""

import json
import sys

import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from traffic import APPLE, WITHOUT_TRITON, counted, layers, on_gpu  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("d", [32, 256])
def test_the_pullback_moves_the_least_and_its_definition_not_much(d):
    import torch

    from rotvq import rotation_trick, rotation_until_used

    z, q, g = torch.randn(3, 500, d)
    z.requires_grad_()
    once = lambda: torch.autograd.grad(rotation_trick(z, q), z, g)
    assert counted(once, on_gpu(500, d), z.nbytes) == {"kernels": 2, "bytes": 6.0}
    half = torch.tensor(0.5)  # the rule's weight goes into the same pass
    weighted = counted(
        lambda: torch.autograd.grad(rotation_until_used(z, q, half), z, g), on_gpu(500, d), z.nbytes
    )
    assert weighted["kernels"] == 2 and abs(weighted["bytes"] - 6) < 1e-3
    spread = lambda: (
        rotation_trick(z, q).sum().backward()
    )  # g has no memory of its own: a copy, and the sum
    assert counted(spread, on_gpu(500, d), z.nbytes)["kernels"] > 3
    # a copy of q for the value, and one pass over g, z and q
    assert counted(once, APPLE, z.nbytes)["bytes"] <= 35
    assert counted(once, WITHOUT_TRITON, z.nbytes)["bytes"] <= 80


def test_the_layer_moves_less_than_a_third_of_the_peer():
    for shape in ((4096, 32, 512), (4096, 256, 1024), (2048, 4, 1024)):
        rows = layers(*shape)["results"]
        assert (
            rows["rotvq, a GPU with Triton"]["bytes"] < rows["vector_quantize_pytorch"]["bytes"] / 3
        )


def test_a_layer_step_is_few_launches_and_few_calls_of_the_host():
    """Default estimator, no mask, no revival; forward, backward and learning. Every operation that
    is no view counts as a launch."""
    import torch

    from rotvq import VectorQuantizer

    vq = VectorQuantizer(16, 64, channel_first=False)
    vq.learn()  # from now on by hand
    z, g = torch.randn(2, 500, 16)
    one = torch.ones(())
    z.requires_grad_()

    def step():
        q, _, loss = vq(z)
        torch.autograd.grad((q, loss), z, (g, one))
        vq.learn()

    for _ in range(11):
        step()  # beyond the one look at λ
    assert counted(step, on_gpu(500, 16), z.nbytes)["kernels"] <= 4

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        "Views, too."

        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Calls() as calls:
        step()
    assert calls.count <= 8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "rotation-until-used"},
        {"revive_after": "auto"},
        {"skip": 0.5},
        {"learnable": True},
        {"distance": "cosine"},
    ],
)
def test_a_step_can_be_replayed(options):
    """What a CUDA graph asks of it: every tensor stays where it lies, and Python keeps nothing that
    differs from step to step."""
    import torch

    from rotvq import VectorQuantizer

    vq = VectorQuantizer(8, 32, channel_first=False, **options)
    vq.learn()
    z = torch.randn(100, 8, requires_grad=True)

    def step():
        q, _, loss = vq(z)
        (q.square().mean() + loss).backward()
        vq.learn()

    def kept(module) -> dict:
        tensors = {
            name: t.data_ptr()
            for name, t in (
                *module.named_parameters(),
                *module.named_buffers(),
                *module.book.collected.items(),
            )
        }
        plain = {
            f"{part}.{name}": repr(value)
            for part in (module, module.book)
            for name, value in vars(part).items()
            if isinstance(value, (int, float, str, bool, list, type(None)))
        }
        return tensors | plain

    for _ in range(11):
        step()  # the layer looks at λ at its tenth batch
    before = kept(vq)
    for _ in range(3):
        step()
    assert kept(vq) == before and {"codes", "sums", "ticket", "drawn"} <= {
        name.split(".")[-1] for name in before
    }


def test_the_page_is_up_to_date():
    """The counts do not depend on the machine; compiled graphs may change with PyTorch and are left
    out."""
    held = json.loads((ROOT / "nbs" / "results" / "traffic.json").read_text(encoding="utf-8"))
    shape = held["layers"][0]
    again = layers(*shape["shape"], only="rotvq, a GPU")["results"]
    assert len(again) == 2
    for name in again:
        assert again[name]["kernels"] == shape["results"][name]["kernels"]
        assert abs(again[name]["bytes"] / shape["results"][name]["bytes"] - 1) < 0.02
