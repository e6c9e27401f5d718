"""torch.export: any batch and size, the same indices, and a saved program that runs where rotvq is
not installed."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim, export, save
from torch.testing import assert_close

from rotvq import FSQ, VQVAE, ProductVQ, ResidualVQ, SimVQ, VectorQuantizer
from rotvq.layer.lookup import TELLS_EXPORTS

pytestmark = pytest.mark.slow


class Part(nn.Module):
    """One way through a model, as a program; its outputs are plain tensors or tuples, which can be
    saved."""

    def __init__(self, model, way):
        super().__init__()
        self.model, self.way = model, way

    def forward(self, x):
        out = getattr(self.model, self.way)(x)
        return tuple(out) if isinstance(out, tuple) else out


def model(**options):
    torch.manual_seed(0)
    return VQVAE(16, 8, **({"codebook_size": 300, "init": "normal"} | options)).eval()


def pictures(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


B, H, W = Dim("B", min=1, max=64), Dim("H", min=1, max=64), Dim("W", min=1, max=64)
WAYS = {
    "forward": ((2, 3, 16, 24), {0: B, 2: 4 * H, 3: 4 * W}),
    "encode": ((2, 3, 16, 24), {0: B, 2: 4 * H, 3: 4 * W}),
    "decode": ((2, 4, 6), {0: B, 1: H, 2: W}),
}
STRICT = [False] + [
    True
] * TELLS_EXPORTS  # before 2.13 PyTorch cannot tell that a strict export is one


def example(way, *shape):
    return torch.randint(300, shape) if way == "decode" else pictures(*shape)


def program(net, way, strict=False):
    shape, dynamic = WAYS[way]
    return export(Part(net, way), (example(way, *shape),), dynamic_shapes=(dynamic,), strict=strict)


# an estimator is met in `forward` alone
ESTIMATED = (
    {"estimator": "ste"},
    {"estimator": "reflection"},
    {"estimator": "rotation-until-used", "skip": 0.5},
)
CASES = [
    (way, options) for way in WAYS for options in ({}, {"distance": "cosine"}, {"learnable": True})
]
CASES += [("forward", options) for options in ESTIMATED]


@pytest.mark.parametrize("strict", STRICT)
@pytest.mark.parametrize("way, options", CASES, ids=str)
def test_any_batch_and_size(way, strict, options):
    net = model(**options)
    made = program(net, way, strict)
    assert not [node for node in made.graph.nodes if "rotvq" in str(node.target)]
    for other in ((5, 4, 3), (1, 2, 2)):
        x = example(way, *(other if way == "decode" else (other[0], 3, 4 * other[1], 4 * other[2])))
        ours, theirs = Part(net, way)(x), made.module()(x)
        assert_close(theirs, ours, rtol=1e-4, atol=1e-5)  # integers must be equal


def test_a_saved_program_runs_without_rotvq(tmp_path):
    net = model()
    expected = {}
    for way in WAYS:
        save(program(net, way), tmp_path / f"{way}.pt2")
        x = example(way, *WAYS[way][0])
        expected[way] = (x, Part(net, way)(x))
    torch.save(expected, tmp_path / "expected.pt")
    code = f"""
import sys
import warnings
sys.modules["rotvq"] = None                                               # importing it raises
import torch
from torch.testing import assert_close
for way, (x, expected) in torch.load({str(tmp_path / "expected.pt")!r}).items():
    found = torch.export.load({str(tmp_path)!r} + f"/{{way}}.pt2").module()(x)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "options",
    [{}, {"distance": "cosine"}, {"learnable": True}, {"estimator": "reflection"}],
    ids=str,
)
def test_the_layer_alone_on_sequences(options):
    layer = VectorQuantizer(8, 32, init="normal", channel_first=False, **options).eval()
    made = export(layer, (torch.randn(4, 6, 8),), dynamic_shapes=({0: B, 1: H},), strict=False)
    z = torch.randn(3, 8, 8)
    assert_close(tuple(made.module()(z)), tuple(layer(z)))


FAMILY = {
    "heads": lambda: VectorQuantizer(8, 32, codebook_dim=3, heads=2, channel_first=False),
    "by angle": lambda: VectorQuantizer(8, 32, distance="angle", channel_first=False),
    "parts": lambda: ProductVQ(8, 32, 2, channel_first=False),
    "stack": lambda: ResidualVQ(8, 32, 3, channel_first=False),
    "stack, projections": lambda: ResidualVQ(
        8, 32, 3, codebook_dim=3, projection="each", channel_first=False
    ),
    "stack of heads": lambda: ResidualVQ(
        8, 32, 3, codebook_dim=3, heads=2, shared_codebook=True, channel_first=False
    ),
    "FSQ": lambda: FSQ((5, 4), 8, channel_first=False),
    "SimVQ": lambda: SimVQ(8, 32, channel_first=False),
}


@pytest.mark.parametrize("strict", STRICT)
@pytest.mark.parametrize("name", FAMILY)
def test_the_family_goes_elsewhere_whole_and_in_halves(name, strict):
    torch.manual_seed(0)
    layer, z = FAMILY[name]().eval(), torch.randn(3, 8, 8)
    sequences = {0: B, 1: H}
    ways = (
        ("forward", torch.randn(4, 6, 8), z),
        ("encode", torch.randn(4, 6, 8), z),
        ("decode", layer.encode(torch.randn(4, 6, 8)), layer.encode(z)),
    )
    for way, x, more in ways[:1] if strict else ways:  # strictly whole: it takes longer
        made = export(Part(layer, way), (x,), dynamic_shapes=(sequences,), strict=strict)
        assert not [node for node in made.graph.nodes if "rotvq" in str(node.target)]
        assert_close(made.module()(more), Part(layer, way)(more), rtol=1e-4, atol=1e-5)


def test_a_layer_that_learns_is_not_exported():
    with pytest.raises(Exception, match=r"\.eval\(\)"):
        export(VectorQuantizer(8, 32), (torch.randn(4, 8),), strict=False)
    frozen = VectorQuantizer(8, 32, frozen=True)
    z = torch.randn(4, 8)
    assert torch.equal(export(frozen, (z,), strict=False).module()(z).indices, frozen.encode(z))


def test_half_precision():
    net = model().bfloat16()
    x = pictures(2, 3, 16, 24).bfloat16()
    made = export(Part(net, "encode"), (x,), strict=False)
    assert torch.equal(made.module()(x), net.encode(x))


def test_an_exported_program_is_for_inference():
    """The estimator is inlined as its value: what follows an encoder in a program gives it no
    gradient."""
    layer = VectorQuantizer(8, 32, init="normal").eval()
    z = torch.randn(4, 8, requires_grad=True)
    out = export(Part(layer, "forward"), (z,), strict=False).module()(z)
    assert torch.equal(out[0], layer(z).q)
    assert (
        not out[0].requires_grad
        or torch.autograd.grad(out[0].sum(), z, allow_unused=True)[0] is None
    )


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_torchscript_by_tracing(way, tmp_path):
    net = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out, and says so
        made = torch.jit.trace(Part(net, way).eval(), (example(way, *WAYS[way][0]),))
        made.save(tmp_path / "model.pt")
        again = torch.jit.load(tmp_path / "model.pt")
    x = example(way, *((5, 4, 3) if way == "decode" else (5, 3, 16, 12)))
    assert_close(again(x), Part(net, way)(x), rtol=1e-4, atol=1e-5)
