"""States of other libraries as ours, and back: what is carried over, and what is refused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as peer
from torch import nn
from torch.testing import assert_close

from rotvq import FSQ, ProductVQ, ResidualVQ, VectorQuantizer, convert_back, convert_state_dict

HEADS = {"codebook_dim": 4, "heads": 2}


class Level(nn.Module):
    "A level as DAC has it: weight norm, lookup by angle, codes as they are."

    def __init__(self, norm):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.in_proj, self.out_proj = norm(nn.Conv1d(6, 3, 1)), norm(nn.Conv1d(3, 6, 1))
        self.codebook = nn.Embedding(16, 3)

    def forward(self, z):
        p = self.in_proj(z).mT
        indices = F.cosine_similarity(p[..., None, :], self.codebook.weight, dim=-1).argmax(-1)
        return self.out_proj(self.codebook(indices).mT), indices


class Dac(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.quantizers = nn.ModuleList(Level(norm) for _ in range(3))

    def forward(self, z):
        left, total, found = z, 0, []
        for level in self.quantizers:
            q, indices = level(left)
            left, total, found = left - q, total + q, [*found, indices]
        return total, torch.stack(found, -1)


class Model(nn.Module):
    def __init__(self, quantizer):
        super().__init__()
        self.before, self.quantizer = nn.Conv1d(2, 6, 1), quantizer


@pytest.mark.parametrize(
    "norm",
    [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, lambda conv: conv],
    ids=["weight_g", "parametrizations", "none"],
)
def test_a_stack_of_convolutions_with_weight_norm(norm):
    torch.manual_seed(0)
    theirs = Model(Dac(norm)).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():  # a norm that is not the length of v
            if name.endswith(("weight_g", "original0")):
                value.mul_(torch.rand_like(value) + 0.5)
    ours = Model(
        ResidualVQ(
            6,
            16,
            3,
            codebook_dim=3,
            projection="each",
            distance="angle",
            learnable=True,
            channel_first=True,
        )
    ).eval()
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), "quantizer."))
    z = torch.randn(4, 6, 50)
    q, indices = theirs.quantizer(z)
    found = ours.quantizer(z)
    assert torch.equal(found.indices, indices)
    assert_close(found.q, q)
    assert torch.equal(ours.before.weight, theirs.before.weight)
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(1.1)  # trained on
    back = Model(Dac(norm)).eval()
    back.load_state_dict(convert_back(ours.state_dict(), theirs.state_dict(), "quantizer."))
    assert_close(back.quantizer(z)[0], ours.quantizer(z).q)
    assert torch.equal(back.before.weight, ours.before.weight)


def train(layer, n=3):
    torch.manual_seed(1)
    for _ in range(n):
        layer(torch.randn(4, 60, 8))
    return layer


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (
            lambda: peer.VectorQuantize(8, 16, codebook_dim=3),
            lambda: VectorQuantizer(8, 16, codebook_dim=3),
        ),
        (lambda: peer.VectorQuantize(8, 16, **HEADS), lambda: VectorQuantizer(8, 16, **HEADS)),
        (
            lambda: peer.VectorQuantize(
                8, 16, codebook_dim=3, heads=2, separate_codebook_per_head=True
            ),
            lambda: ProductVQ(8, 16, codebook_dim=3, heads=2),
        ),
        (
            lambda: peer.VectorQuantize(
                8, 16, learnable_codebook=True, ema_update=False, codebook_dim=3
            ),
            lambda: VectorQuantizer(8, 16, codebook_dim=3, learnable=True),
        ),
        (
            lambda: peer.VectorQuantize(8, 16, use_cosine_sim=True, codebook_dim=3),
            lambda: VectorQuantizer(8, 16, codebook_dim=3, distance="cosine"),
        ),
        (
            lambda: peer.ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, codebook_dim=3),
            lambda: ResidualVQ(8, 16, 3, codebook_dim=3),
        ),
        (
            lambda: peer.ResidualVQ(
                dim=8, codebook_size=16, num_quantizers=3, shared_codebook=True
            ),
            lambda: ResidualVQ(8, 16, 3, shared_codebook=True),
        ),
    ],
)
def test_layers_inside_a_model_go_there_and_back(theirs, ours):
    theirs, ours = Model(train(theirs())), Model(ours())
    options = {
        "learnable": getattr(ours.quantizer, "learnable", False),
        "shared_codebook": getattr(ours.quantizer, "shared_codebook", False),
    }
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), "quantizer.", **options))
    z = torch.randn(2, 60, 8)
    q, indices = theirs.eval().quantizer(z)[:2]
    found = ours.eval().quantizer(z)
    assert torch.equal(found.indices, indices)
    assert_close(found.q, q)
    back = convert_back(ours.state_dict(), theirs.state_dict(), "quantizer.")
    assert back.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(back)
    assert torch.equal(theirs.quantizer(z)[1], indices)
    assert_close(theirs.quantizer(z)[0], q)
    changed = convert_state_dict(theirs.state_dict(), "quantizer.", **options)
    assert all(
        value.data_ptr()
        not in {t.data_ptr() for n, t in theirs.state_dict().items() if n.startswith("quantizer")}
        for n, value in changed.items()
        if n.startswith("quantizer")
    )  # copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encodec_and_moshi_by_their_names(dtype):
    torch.manual_seed(0)
    codes, counts = torch.randn(2, 16, 4, dtype=dtype), 3 * torch.rand(2, 16, dtype=dtype)
    counts[0, 3] = 0
    encodec = {
        f"vq.layers.{i}._codebook.{name}": value
        for i in (0, 1)
        for name, value in (
            ("inited", torch.ones(1)),
            ("cluster_size", counts[i]),
            ("embed", codes[i]),
            ("embed_avg", 2 * codes[i]),
        )
    }
    moshi = {"input_proj.weight": torch.randn(4, 6, 1), "output_proj.weight": torch.randn(6, 4, 1)}
    moshi |= {
        f"vq.layers.{i}._codebook.{name}": value
        for i in (0, 1)
        for name, value in (
            ("_initialized", torch.ones(1)),
            ("cluster_usage", counts[i]),
            ("embedding_sum", codes[i] * counts[i, :, None]),
        )
    }
    plain, projected = (
        ResidualVQ(4, 16, 2),
        ResidualVQ(6, 16, 2, codebook_dim=4, projection_bias=False),
    )
    plain.load_state_dict(convert_state_dict(encodec))
    assert_close(torch.stack([layer.codebook for layer in plain.layers]), codes.float())
    assert_close(torch.stack([layer.sums for layer in plain.layers]), 2 * codes.float())
    projected.load_state_dict(convert_state_dict(moshi))
    for i, layer in enumerate(projected.layers):
        used = counts[i] > 1e-5
        assert_close(layer.codebook[used], codes[i][used].float(), rtol=1e-5, atol=1e-6)
        assert (layer.codebook[~used] == 0).all() and layer.book.ready == 1
    for state, ours in ((encodec, plain), (moshi, projected)):
        back = convert_back(ours.state_dict(), state)
        for name, value in state.items():
            assert back[name].dtype == value.dtype and back[name].shape == value.shape
            assert_close(back[name], value, rtol=1e-4, atol=2e-5)


def test_a_codebook_that_is_an_embedding():
    """taming-transformers and diffusers: `quantize.embedding.weight`; RQ-VAE-Recommender:
    `layers.0.embedding.weight`."""
    torch.manual_seed(0)
    codes = torch.randn(3, 16, 8)
    layer, stack = VectorQuantizer(8, 16, learnable=True), ResidualVQ(8, 16, 3, learnable=True)
    state = {"quantize.embedding.weight": codes[0], "encoder.weight": torch.ones(2)}
    found = convert_state_dict(state, "quantize.")
    assert torch.equal(found["encoder.weight"], state["encoder.weight"])
    layer.load_state_dict(
        {k.removeprefix("quantize."): v for k, v in found.items() if k.startswith("quantize.")}
    )
    assert torch.equal(layer.codebook, codes[0])
    back = convert_back(found, state, "quantize.")
    assert back.keys() == state.keys() and torch.equal(back["quantize.embedding.weight"], codes[0])
    stack.load_state_dict(
        convert_state_dict({f"layers.{i}.embedding.weight": c for i, c in enumerate(codes)})
    )
    assert torch.equal(torch.stack([level.codebook for level in stack.layers]), codes)


def test_the_names_of_fsq_are_the_same():
    torch.manual_seed(0)
    theirs, ours, z = peer.FSQ([8, 5], 8), FSQ((8, 5), 8, channel_first=False), torch.randn(3, 5, 8)
    ours.load_state_dict(theirs.state_dict()), theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(z).indices, theirs(z)[1].long())


@pytest.mark.parametrize(
    "state, named",
    [
        ({"vq._codebook.embed": torch.zeros(1, 2, 2)}, "Set prefix to what comes before"),
        ({}, "no codebook"),
        (
            lambda: peer.VectorQuantize(
                8, 16, codebook_dim=3, layernorm_after_project_in=True
            ).state_dict(),
            "project_in.1",
        ),
        (
            lambda: peer.VectorQuantize(8, 16, affine_param=True).state_dict(),
            "batch_mean|codebook_mean",
        ),
        (lambda: peer.LFQ(dim=8, codebook_size=16).state_dict(), "no codebook|nothing for"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(state, named):
    with pytest.raises(ValueError, match=named):
        convert_state_dict(state() if callable(state) else state)


def test_the_way_back_names_what_our_layer_lacks():
    like = peer.VectorQuantize(8, 16, codebook_dim=3).state_dict()
    with pytest.raises(ValueError, match="no project_in.weight"):
        convert_back(VectorQuantizer(8, 16).state_dict(), like)


@pytest.mark.parametrize(
    "ours, like, named",
    [
        (
            lambda: ResidualVQ(8, 16, 2),
            lambda: peer.ResidualVQ(dim=8, codebook_size=16, num_quantizers=3),
            "no layers.2.book.codes",
        ),
        (
            lambda: ResidualVQ(8, 16, 4),
            lambda: peer.ResidualVQ(dim=8, codebook_size=16, num_quantizers=2),
            "no place for .*layers.2.book",
        ),
        (
            lambda: VectorQuantizer(8, 16, codebook_dim=4),
            lambda: peer.VectorQuantize(4, 16),
            "no place for .*project_in",
        ),
        (
            lambda: ResidualVQ(8, 16, 2, codebook_dim=4),
            lambda: nn.ModuleDict(
                {
                    "layers": nn.ModuleList(
                        [nn.ModuleDict({"codebook": nn.Embedding(16, 4)}) for _ in range(2)]
                    ),
                    "input_proj": nn.Conv1d(8, 4, 1, bias=False),
                    "output_proj": nn.Conv1d(4, 8, 1, bias=False),
                }
            ),
            "no place for .*project_in.0.bias",
        ),
        (lambda: VectorQuantizer(8, 16), lambda: peer.VectorQuantize(8, 32), r"\(1, 32\)"),
        (
            lambda: VectorQuantizer(8, 16),
            lambda: nn.ModuleDict({"codebook": nn.Embedding(8, 16)}),
            r"\(8, 16\)",
        ),
        (lambda: nn.Identity(), lambda: peer.VectorQuantize(8, 16), "no book.codes"),
    ],
)
def test_a_way_back_that_would_lose_something_is_refused(ours, like, named):
    with pytest.raises(ValueError, match=named):
        convert_back(ours().state_dict(), like().state_dict())


def test_states_that_are_not_what_they_are_said_to_be_are_refused():
    state = train(peer.ResidualVQ(dim=8, codebook_size=16, num_quantizers=3)).state_dict()
    with pytest.raises(ValueError, match="do not share"):
        convert_state_dict(state, shared_codebook=True)
    for state, named in (
        ({"layers.0._codebook.embedding_sum": torch.ones(4, 2)}, "no .'counts'"),
        (
            {"codebook.weight": torch.ones(4, 2), "in_proj.weight_v": torch.ones(2, 2, 1)},
            "no .'length'",
        ),
        (
            {"codebook.weight": torch.ones(4, 2), "in_proj.weight_g": torch.ones(2, 1, 1)},
            "no .'direction'",
        ),
    ):
        with pytest.raises(ValueError, match=named):
            convert_state_dict(state)
