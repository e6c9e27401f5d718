"""Several codes side by side, lookups in fewer dimensions, and the lookup by angle: heads,
codebook_dim, ProductVQ, distance="angle"."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from vector_quantize_pytorch import VectorQuantize

from rotvq import ProductVQ, ResidualVQ, VectorQuantizer, learn_after, rotation_trick
from rotvq.layer.lookup import nearest_code

PLAIN = {"channel_first": False, "init": "normal"}
ONE = [
    {"codebook_dim": 3},
    {"codebook_dim": 3, "heads": 2},
    {"codebook_dim": 2, "heads": 2},
    {"codebook_dim": 3, "heads": 2, "distance": "cosine"},
]
OWN = [{}, {"codebook_dim": 2}, {"distance": "cosine"}]


def layer(**options) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(6, 16, **PLAIN | options)


def product(**options) -> ProductVQ:
    torch.manual_seed(0)
    return ProductVQ(6, 16, 2, **PLAIN | options)


EACH = [*((layer, o) for o in ONE), *((product, o) for o in OWN)]


def same_state(ours, theirs) -> None:
    "Ours gets the codes and the maps of theirs."
    codes = theirs._codebook.embed
    books = [part.book for part in ours.layers] if isinstance(ours, ProductVQ) else [ours.book]
    for book, c in zip(books, codes, strict=True):
        book.codes.copy_(c), book.sums.copy_(c), book.counts.fill_(1)
    theirs._codebook.cluster_size.fill_(1)
    for name in ("project_in", "project_out"):
        if getattr(ours, name) is not None:
            own, other = getattr(ours, name), getattr(theirs, name)
            own.load_state_dict(
                (other[0] if isinstance(other, nn.Sequential) else other).state_dict()
            )


@pytest.mark.parametrize("estimator", ["ste", "rotation"])
@pytest.mark.parametrize("make, options", EACH[:-1])
def test_steps_are_those_of_an_independent_implementation(make, options, estimator):
    ours, known = (
        make(**options, estimator=estimator),
        {k: v for k, v in options.items() if k != "distance"},
    )
    if make is product:
        known = {"codebook_dim": 3} | known | {"heads": 2, "separate_codebook_per_head": True}
    theirs = VectorQuantize(
        6, 16, **known, use_cosine_sim="distance" in options, rotation_trick=estimator == "rotation"
    )
    same_state(ours, theirs)
    for _ in range(4):
        z = torch.randn(3, 20, 6, requires_grad=True)
        g = torch.randn_like(z)
        outs = [layer(z) for layer in (ours, theirs)]
        assert torch.equal(outs[0][1], outs[1][1]) and outs[0][1].shape == (
            3,
            20,
            *([2] if known.get("heads", 1) > 1 else []),
        )
        assert_close(outs[0][0], outs[1][0])
        assert_close(outs[0][2], outs[1][2].reshape(()))
        grads = [torch.autograd.grad((q * g).sum() + loss.sum(), z)[0] for q, _, loss in outs]
        assert_close(*grads, rtol=1e-4, atol=1e-5)
    books = [part.codebook for part in ours.layers] if make is product else [ours.codebook]
    assert_close(torch.stack([*books]), theirs._codebook.embed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make, options", EACH)
def test_encode_and_decode_say_what_forward_does_in_either_layout(make, options):
    vq, z = make(**options).eval(), torch.randn(3, 5, 6)
    q, indices, loss = vq(z)
    assert torch.equal(vq.encode(z), indices) and torch.equal(vq.decode(indices), q) and loss > 0
    assert torch.equal(vq.get_output_from_indices(indices), q) and torch.equal(
        vq.get_codes_from_indices(indices), vq.codes(indices)
    )
    maps = make(**options | {"channel_first": True}).eval()
    maps.load_state_dict(vq.state_dict())
    other = maps(z.movedim(-1, 1))
    assert torch.equal(other.indices, indices) and torch.equal(maps.decode(indices), other.q)
    assert_close(other.q.movedim(1, -1), q)


@pytest.mark.parametrize("make, options", EACH)
def test_padding_is_as_if_it_were_not_there(make, options):
    vq, z = make(**options), torch.randn(2, 9, 6)
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    z[~mask] = torch.nan
    both = [make(**options) for _ in range(2)]
    padded, bare = both[0](z, mask), both[1](z[mask])
    assert_close(padded.q[mask], bare.q), assert_close(padded.loss, bare.loss)
    assert (
        torch.equal(padded.indices[mask], bare.indices)
        and (padded.indices[~mask] == -1).all()
        and (padded.q[~mask] == 0).all()
    )
    assert torch.equal(vq.eval().decode(vq.encode(z, mask))[~mask], torch.zeros(5, 6))
    for a, b in zip(*(copy.state_dict().values() for copy in both), strict=True):
        assert_close(a, b)  # learned the same
    vq(z, torch.zeros(2, 9, dtype=torch.bool)), vq(z[:0])


@pytest.mark.parametrize("make, options", EACH)
@pytest.mark.parametrize("estimator", ["ste", "rotation", "rotation-until-used", "reflection"])
def test_no_projection_is_without_a_gradient_and_all_of_it_trains(make, options, estimator):
    vq, z = make(**options, estimator=estimator, skip=0.2), torch.randn(200, 1, 6)
    decoder = nn.Linear(6, 6)
    model = nn.ModuleList([vq, decoder])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    learn_after(model, optimizer)
    errors = []
    for _ in range(40):
        q, _, loss = vq(z)
        error = (decoder(q) - z).square().mean()
        optimizer.zero_grad(), (error + loss).backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step(), errors.append(error.item())
    books = vq.layers if make is product else [vq]
    assert errors[-1] < 0.9 * errors[0] and all(book.batches == 40 for book in books)


@pytest.mark.parametrize("reduction, shape", [("mean", ()), ("sample", (3,)), ("none", (3, 5, 2))])
def test_losses_by_sample_and_part_have_the_same_mean(reduction, shape):
    z = torch.randn(3, 5, 6)
    for make, options in ((layer, ONE[1]), (product, {})):
        loss = make(**options, reduction=reduction).eval()(z).loss
        assert loss.shape == shape
        assert_close(loss.mean(), make(**options).eval()(z).loss)


@pytest.mark.parametrize("make, options", EACH)
def test_half_precision_copies_and_a_kmeans_start(make, options):
    vq, z = make(**options), torch.randn(400, 6)
    vq.kmeans_init(z)
    before, after = (
        (make(**options).eval()(z).q - z).square().mean(),
        (vq.eval()(z).q - z).square().mean(),
    )
    seen = vq.diagnose(z)
    assert (
        all(d.usage == 1 for d in (seen if isinstance(seen, list) else [seen]))
        and (vq.layers[0] if make is product else vq).book.ready
    )
    if vq.project_in is None and "distance" not in options:
        assert after < before
    half = make(**options).to(torch.bfloat16)
    q, indices, loss = half(z.bfloat16())
    assert q.dtype == torch.bfloat16 and half.decode(indices).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert vq(z).q.dtype == torch.float32


def test_what_cannot_be_cut_is_refused():
    for make, named in (
        (lambda: layer(heads=2), "heads = 2 need codebook_dim.*= 3"),
        (lambda: layer(heads=0), "heads = 0"),
        (lambda: layer(codebook_dim=0), "codebook_dim = 0"),
        (lambda: VectorQuantizer(0, 8, codebook_dim=2), "dim = 0"),
        (lambda: ProductVQ(7, 8, 2), "dim = 7 cannot be cut into heads = 2"),
        (lambda: product(skip=2), "skip = 2"),
        (lambda: ProductVQ(6, 8, 0), "heads = 0"),
        (lambda: ProductVQ(6, 8, 2, codebook_dim=0), "codebook_dim = 0"),
        (lambda: layer(codebook_dim=3, heads=2).decode(torch.zeros(4, 3).long()), "heads = 2"),
        (lambda: product().decode(torch.zeros(4, 3).long()), "heads = 2"),
    ):
        with pytest.raises(ValueError, match=named):
            make()


def test_repr_and_options_make_the_layer_again():
    vq = layer(codebook_dim=3, heads=2, projection_bias=False)
    assert "codebook_dim=3, heads=2" in repr(vq) and "codebook_dim" not in repr(layer())
    again = VectorQuantizer(vq.dim, vq.codebook_size, **vq.options())
    again.load_state_dict(vq.state_dict())
    assert (
        again.options(every=True) == vq.options(every=True)
        and layer().options(every=True)["codebook_dim"] == 6
    )
    with pytest.raises(AttributeError, match="another layer"):
        vq.dim = 8


# By angle


@pytest.mark.parametrize("learnable", [False, True])
def test_by_angle_looks_up_as_the_cosine_and_keeps_every_length(learnable):
    torch.manual_seed(0)
    vq, z = (
        VectorQuantizer(6, 16, distance="angle", learnable=learnable, **PLAIN),
        5 * torch.randn(50, 6),
    )
    codes, indices = vq.codebook.detach().clone(), vq.encode(z)
    assert torch.equal(
        indices, torch.nn.functional.cosine_similarity(z[:, None], codes, dim=-1).argmax(1)
    )
    assert torch.equal(indices, nearest_code(z, codes, distance="cosine")) and torch.equal(
        indices, nearest_code(z, codes, distance="angle")
    )
    q, found, loss = vq(z)
    assert torch.equal(found, indices) and torch.equal(q, codes[indices])
    assert_close(loss, (1 + learnable) * (z - codes[indices]).square().mean())
    if not learnable:  # the mean of what chose it, as long as it is
        sums, counts = torch.zeros(16, 6).index_add_(0, indices, z), indices.bincount(minlength=16)
        n = 0.8 + 0.2 * counts
        smooth = (n + 1e-5) / (n.sum() + 16e-5) * n.sum()
        assert_close(vq.codebook, (0.8 * codes + 0.2 * sums) / smooth[:, None])


def test_a_start_by_kmeans_and_the_gradient_by_angle():
    torch.manual_seed(0)
    z = torch.randn(500, 4) * torch.rand(500, 1) * 9
    vq = VectorQuantizer(4, 8, distance="angle", init="kmeans", channel_first=False)
    vq(z)
    vq.eval()
    lengths = vq.codebook.norm(dim=1)
    assert lengths.max() > 1.5 and vq.usage() == 1
    x = z.clone().requires_grad_()
    q, indices, _ = vq(x)
    g = torch.randn_like(z)
    (got,) = torch.autograd.grad(q, x, g)
    y = z.clone().requires_grad_()
    assert_close(got, torch.autograd.grad(rotation_trick(y, vq.codebook[indices]), y, g)[0])


# Stacks of heads


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"projection": "each"},
        {"projection": "each", "gradient": "levels"},
        {"projection": "each", "gradient": "direct"},
    ],
)
def test_a_stack_of_heads(form):
    torch.manual_seed(0)
    vq = ResidualVQ(6, 16, 3, codebook_dim=2, heads=2, **PLAIN, **form)
    z = torch.randn(40, 5, 6, requires_grad=True)
    vq.learn()
    q, indices, loss = vq(z)
    assert indices.shape == (40, 5, 3, 2) and torch.equal(vq.encode(z), indices)
    assert_close(vq.decode(indices), q)
    assert vq.codes(indices).shape == (3, 40, 5, 4)
    g = torch.randn_like(q)
    assert all(
        x is not None and x.any()
        for x in torch.autograd.grad(q, [z, *vq.project_in.parameters()], g)
    )
    for n in (1, 2):
        assert_close(vq(z, num_quantizers=n).q, vq.decode(indices[:, :, :n]))
    dropped = ResidualVQ(6, 16, 3, codebook_dim=2, heads=2, quantizer_dropout=1.0, **PLAIN, **form)
    found = dropped(z)
    assert (found.indices[..., 0] < 0).any() and torch.equal(
        found.indices[..., 0] < 0, found.indices[..., 1] < 0
    )
    dropped.learn()
    assert_close(dropped(z).q, dropped.decode(dropped(z).indices))
    each = ResidualVQ(6, 16, 3, codebook_dim=2, heads=2, reduction="none", **PLAIN, **form)
    assert each(z).loss.shape == (40, 5, 3, 2)
    with pytest.raises(ValueError, match="heads = 2"):
        vq.decode(indices[..., 0])


def test_levels_of_other_lengths():
    torch.manual_seed(0)
    vq, z = (
        ResidualVQ(6, [8, 16, 32], codebook_dim=[2, 3, 6], projection="each", **PLAIN),
        torch.randn(40, 6),
    )
    vq.learn()
    q, indices, _ = vq(z)
    assert_close(vq.decode(indices), q)
    assert [level.codebook.shape for level in vq.layers] == [(8, 2), (16, 3), (32, 6)] and len(
        vq.project_in
    ) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: ResidualVQ(6, 16, 3, codebook_dim=4, **PLAIN, **o),
        lambda **o: ResidualVQ(6, 16, 3, **PLAIN, **o),
        lambda **o: ResidualVQ(6, 16, 3, codebook_dim=4, projection="each", **PLAIN, **o),
        product,
    ],
)
def test_a_sample_passes_by_all_lookups_or_by_none(make):
    torch.manual_seed(0)
    vq, plain = make(skip=0.5), make()
    plain.load_state_dict(vq.state_dict())
    for one in (vq, plain):
        one.learn()
    z = torch.randn(300, 4, 6)
    out, other = vq(z), plain(z)
    past = (out.q != other.q).any(-1)
    assert torch.equal(past.any(1), past.all(1)) and 0.4 < past[:, 0].float().mean() < 0.6
    assert torch.equal(out.indices, other.indices) and torch.equal(out.loss, other.loss)
    if getattr(vq, "projection", "") == "each" or vq.dim == vq.codebook_dim * getattr(
        vq, "heads", 1
    ):
        assert torch.equal(out.q[past], z[past])
    assert torch.equal(vq.eval()(z).q, plain.eval()(z).q)
