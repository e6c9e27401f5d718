"""A stack of levels: what it refuses, and that it does what its levels do, wherever it goes."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from vector_quantize_pytorch import ResidualVQ as Theirs

from rotvq import (
    ProductVQ,
    ResidualVQ,
    VectorQuantizer,
    convert_state_dict,
    learn_after,
    rotation_trick,
    straight_through,
)

FORMS = [
    {},
    {"codebook_dim": 3},
    *(
        {"codebook_dim": 3, "projection": "each", "gradient": gradient}
        for gradient in ("through", "held", "levels", "direct")
    ),
]
WAYS = ["ste", "rotation", "rotation-until-used", "reflection", lambda z, q: q + 0 * z]


def stack(dim=6, size=10, levels=3, **options) -> ResidualVQ:
    torch.manual_seed(0)
    return ResidualVQ(dim, size, levels, init="normal", channel_first=False, **options)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"codebook_size": [4, 5]}, "2 numbers for 3 levels"),
        ({"num_quantizers": 0}, "num_quantizers = 0"),
        ({"num_quantizers": None}, "num_quantizers = None"),
        ({"projection": "both"}, "projection is 'both'"),
        ({"gradient": "sum"}, "gradient is 'sum'"),
        ({"reduction": "sum"}, "reduction is 'sum'"),
        ({"quantizer_dropout": 1.5}, "quantizer_dropout = 1.5"),
        ({"min_quantizers": 4}, "min_quantizers = 4"),
        ({"shared_codebook": True, "codebook_size": [4, 5, 6]}, "shared codebook"),
        ({"codebook_dim": [2, 3, 3]}, "codebook_dim = .2, 3, 3."),
        ({"heads": 2}, "heads = 2 need codebook_dim"),
        ({"skip": -1}, "skip = -1"),
        ({"estimator": "none"}, "estimator is 'none'"),
        ({"codebook_dim": 0}, "codebook_dim = 0"),
        ({"decay": 2}, "decay = 2"),
    ],
)
def test_what_makes_no_stack_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        ResidualVQ(**{"dim": 4, "codebook_size": 8, "num_quantizers": 3} | options)


@pytest.mark.parametrize(
    "indices, named",
    [
        (torch.tensor([[0, -1, 2]]), r"\(0, 1\) are −1"),
        (torch.zeros(2, 4).long(), "1 to 3 levels"),
        (torch.zeros(2, 0).long(), "1 to 3 levels"),
        (torch.tensor(3), "1 to 3 levels"),
        (torch.zeros(2, 3), "integers"),
    ],
)
def test_indices_that_no_stack_gives_are_refused(indices, named):
    with pytest.raises((ValueError, TypeError), match=named):
        stack().eval().decode(indices)


def test_a_prefix_of_none_or_too_many_is_refused():
    for count in (0, 4, -1):
        for call in (stack(), stack().encode):
            with pytest.raises(ValueError, match=f"num_quantizers = {count}"):
                call(torch.randn(5, 6), num_quantizers=count)


def test_a_shared_codebook_does_not_move_between_levels():
    vq = stack(shared_codebook=True)
    with pytest.raises(RuntimeError, match="learn_after"):
        vq(torch.randn(5, 6))
    vq.eval()(torch.randn(5, 6))
    vq.train().learn()
    vq(torch.randn(50, 6)), vq.learn()
    assert vq.layers[0].batches == 1 and vq.layers[0].idle.min() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_values_indices_and_prefixes(form, way):
    vq, z = stack(estimator=WAYS[way], **form), torch.randn(4, 7, 6)
    vq.learn()
    q, indices, loss = vq(z)
    assert q.shape == z.shape and indices.shape == (4, 7, 3) and loss.ndim == 0 and loss > 0
    assert_close(vq.decode(indices), q)
    assert torch.equal(vq.encode(z), indices)
    for n in (1, 2):
        assert_close(vq(z, num_quantizers=n).q, vq.decode(indices[..., :n]))
    left = indices.clone()
    left[0, :, 1:] = -1  # a sample with one level among others
    assert_close(vq.decode(left)[0], vq.decode(indices[:1, :, :1])[0])
    assert_close(vq.decode(left)[1:], q[1:])
    codes = vq.codes(indices)
    assert codes.shape == (3, 4, 7, vq.codebook_dim)
    if not form:
        assert_close(codes.sum(0), q)
    first = ResidualVQ(6, 10, 3, channel_first=True, estimator=WAYS[way], **form)
    first.load_state_dict(vq.state_dict())
    maps = first.eval()(z.movedim(-1, 1))
    assert_close(maps.q.movedim(1, -1), vq.eval()(z).q)
    assert torch.equal(maps.indices, vq(z).indices) and first.decode(maps.indices).shape == (
        4,
        6,
        7,
    )


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_as_if_it_were_not_there(form):
    vq, z = stack(**form).eval(), torch.randn(3, 8, 6)
    lengths = torch.tensor([8, 3, 5])
    mask = torch.arange(8) < lengths[:, None]
    z[~mask] = torch.nan
    z.requires_grad_()
    q, indices, loss = vq(z, mask)
    whole = [vq(z[b : b + 1, :n]) for b, n in enumerate(lengths)]
    for b, n in enumerate(lengths):
        assert_close(q[b, :n], whole[b].q[0])
        assert (
            torch.equal(indices[b, :n], whole[b].indices[0])
            and (indices[b, n:] == -1).all()
            and (q[b, n:] == 0).all()
        )
    assert_close(loss, sum(w.loss * n for w, n in zip(whole, lengths)) / lengths.sum())
    (q.square().sum() + loss).backward()
    assert z.grad[mask].isfinite().all() and (z.grad[~mask] == 0).all()


@pytest.mark.parametrize(
    "reduction, shape", [("mean", ()), ("level", (3,)), ("sample", (4,)), ("none", (4, 7, 3))]
)
@pytest.mark.parametrize("form", FORMS[::2])
def test_losses_by_level_sample_and_token_add_up(reduction, shape, form):
    vq = stack(reduction=reduction, **form).eval()
    mean, z = stack(**form).eval(), torch.randn(4, 7, 6)
    loss = vq(z).loss
    assert loss.shape == shape
    total = {"mean": loss, "level": loss.sum(), "sample": loss.mean(), "none": loss.sum(-1).mean()}[
        reduction
    ]
    assert_close(total, mean(z).loss)


def test_dropout_is_of_samples_repeats_itself_and_teaches_no_level_that_is_left_out():
    vq, z = stack(quantizer_dropout=1.0), torch.randn(300, 4, 6)
    vq.learn()
    q, indices, loss = vq(z)
    again = vq(z)
    assert torch.equal(indices, again.indices) and torch.equal(
        q, again.q
    )  # as an activation checkpoint asks
    vq.discard()
    many = (vq(z).indices >= 0).sum(-1)
    assert torch.equal(many.amin(1), many.amax(1)) and many.unique().tolist() == [1, 2, 3]
    vq.learn()
    for level, layer in enumerate(
        vq.layers
    ):  # running counts: .8 · 10 at the start, .2 · the batch
        assert_close(layer.counts.sum(), 0.8 * 10 + 0.2 * (many > level).sum())
    after = vq(z).indices
    assert not torch.equal(after >= 0, indices >= 0)  # the next batch leaves out others
    two = stack(quantizer_dropout=1.0, min_quantizers=2)
    assert ((two(z).indices >= 0).sum(-1) >= 2).all()
    assert (stack(quantizer_dropout=1.0).eval()(z).indices >= 0).all()
    vq(z, num_quantizers=1), vq(z[:0]), vq(z, torch.zeros(300, 4, dtype=torch.bool))


def test_kmeans_level_by_level_lowers_the_error_and_leaves_no_code_unused():
    z = torch.randn(2000, 6)
    vq = stack(size=16, levels=4)
    vq.kmeans_init(z, generator=torch.Generator().manual_seed(0))
    errors = [(vq.eval()(z, num_quantizers=n).q - z).square().mean() for n in range(1, 5)]
    assert all(a > 1.2 * b for a, b in itertools.pairwise(errors))
    seen = vq.diagnose(z)
    assert (
        len(seen) == 4
        and all(d.usage == 1 for d in seen)
        and seen[0].quantization_error > seen[3].quantization_error
    )
    at_first = ResidualVQ(6, 16, 4, init="kmeans", channel_first=False)
    at_first(z)  # each level when the ones before have theirs
    assert (at_first.eval()(z).q - z).square().mean() < 1.2 * errors[-1]


@pytest.mark.parametrize("form", FORMS)
def test_everything_learns(form):
    "Twenty steps with an optimizer: the codes move once a step, and the error falls."
    vq, z = stack(size=32, **form), torch.randn(400, 6)
    net = nn.Sequential(nn.Linear(6, 6), vq)
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    learn_after(net, opt)
    errors = []
    for _ in range(20):
        q, _, loss = net(z)
        error = (q - z).square().mean()
        opt.zero_grad(), (error + loss).backward(), opt.step()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]
    assert all(layer.batches == 20 for layer in vq.layers)
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_compiled_copied_saved_and_in_half_precision(form):
    vq, z = stack(**form), torch.randn(5, 7, 6)
    vq.learn()
    twin = stack(**form)
    twin.load_state_dict(copy.deepcopy(vq).state_dict())
    for net in (vq, twin):
        net.eval()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    leaf = z.clone().requires_grad_()
    results = []
    for net in (vq, compiled):
        q, indices, loss = net(leaf)
        results.append((q, indices, loss, torch.autograd.grad(q.square().sum() + loss, leaf)[0]))
    for a, b in zip(*results):
        assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        q, indices, loss = vq(z.bfloat16())
        assert q.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert_close(q.float(), vq.decode(indices), rtol=2e-2, atol=2e-2)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):  # the whole model
        q, indices, loss = vq.to(dtype)(z.to(dtype))
        assert (
            q.dtype == dtype
            and torch.equal(vq.encode(z.to(dtype)), indices)
            and loss.dtype.itemsize >= 4
        )
        assert_close(q, vq.decode(indices), rtol=2e-2, atol=2e-2, check_dtype=False)


def test_against_an_independent_implementation():
    "A stack with shared projections: the same codes give the same indices, values and losses."
    torch.manual_seed(0)
    theirs = Theirs(dim=12, codebook_dim=5, codebook_size=16, num_quantizers=4).eval()
    ours = ResidualVQ(12, 16, 4, codebook_dim=5, channel_first=False).eval()
    for a, b in (
        (ours.project_in[0], theirs.project_in),
        (ours.project_out[0], theirs.project_out),
    ):
        a.load_state_dict(b.state_dict())
    with torch.no_grad():
        for level, layer in zip(ours.layers, theirs.layers):
            level.codebook.copy_(layer._codebook.embed[0])
    z = torch.randn(3, 50, 12)
    q, indices, _ = theirs(z)
    found = ours(z)
    assert torch.equal(found.indices, indices)
    assert_close(found.q, q)
    assert_close(
        ours.decode(indices[..., :2]),
        theirs.get_output_from_indices(
            torch.cat([indices[..., :2], torch.full_like(indices[..., :2], -1)], -1)
        ),
    )
    assert_close(ours.codes(indices), theirs.get_codes_from_indices(indices))


@pytest.mark.parametrize("trick, name", [(straight_through, "ste"), (rotation_trick, "rotation")])
def test_without_projections_the_stack_is_one_lookup(trick, name):
    vq, z, g = stack(estimator=name).eval(), torch.randn(9, 6), torch.randn(9, 6)
    z.requires_grad_()
    mine, other = (
        torch.autograd.grad(q, z, g)[0] for q in (vq(z).q, trick(z, vq.decode(vq.encode(z))))
    )
    assert torch.equal(mine, other)


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_encode_agree_to_the_last_bit(form):
    "Of 65,536 vectors one came out otherwise, once, where two codes were equally near."
    vq, z = stack(size=64, levels=4, **form).eval(), torch.randn(40_000, 6)
    assert torch.equal(vq(z).indices, vq.encode(z))


def test_options_of_all_levels_are_set_at_once():
    vq, z = stack(levels=3, commitment=0.25), torch.randn(50, 6)
    assert vq.commitment == 0.25 and not vq.frozen and vq.distance == "euclidean"
    vq.frozen, vq.decay, vq.revive_after = True, 0.5, 7
    before = [layer.codebook.clone() for layer in vq.layers]
    vq(z), vq(z)
    assert all(torch.equal(layer.codebook, old) for layer, old in zip(vq.layers, before))
    assert {(layer.frozen, layer.decay, layer.revive_after) for layer in vq.layers} == {
        (True, 0.5, 7)
    }
    with pytest.raises(ValueError, match="decay = 2"):
        vq.decay = 2
    with pytest.raises(AttributeError):
        vq.distance = "cosine"


def test_skip_and_dropout_are_drawn_apart():
    vq, z = stack(quantizer_dropout=0.5, skip=0.5), torch.randn(4000, 2, 6)
    vq.learn()
    q, indices, _ = vq(z)
    past, fewer = (q == z).flatten(1).all(1), (indices < 0).flatten(1).any(1)
    assert (
        abs((past & fewer).float().mean() - past.float().mean() * fewer.float().mean()) < 0.02
        and 0.3 < fewer.float().mean() < 0.36
    )


MAKE = [
    lambda **o: stack(**o),
    lambda **o: stack(codebook_dim=3, projection="each", **o),
    lambda **o: stack(quantizer_dropout=0.5, **o),
    lambda **o: (
        torch.manual_seed(0),
        ProductVQ(6, 10, 2, init="normal", channel_first=False, **o),
    )[1],
]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"skip": 0.5}, {"revive_after": 2}, {"estimator": "rotation-until-used"}],
    ids=str,
)
@pytest.mark.parametrize("make", range(len(MAKE)))
@pytest.mark.parametrize("by_hand", [False, True])
def test_checkpoints_around_a_stack_change_nothing(make, options, reentrant, by_hand):
    from torch.utils.checkpoint import checkpoint

    pair = [MAKE[make](**options) for _ in range(2)]
    if by_hand:
        [vq.learn() for vq in pair]
    for step in range(4):
        z = torch.randn(40, 3, 6, generator=torch.Generator().manual_seed(step))
        leaves = [z.clone().requires_grad_() for _ in pair]
        outs = [pair[0](leaves[0]), checkpoint(pair[1], leaves[1], use_reentrant=reentrant)]
        assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])
        for q, _, loss in outs:
            (q.sin().sum() + loss).backward()
        assert torch.equal(*(leaf.grad for leaf in leaves))
        if by_hand:
            [vq.learn() for vq in pair]
    for a, b in zip(*(vq.state_dict().values() for vq in pair), strict=True):
        assert torch.equal(a, b)


def test_nothing_moves_within_a_pass():
    for make in MAKE:
        vq = make(skip=0.5)
        vq(torch.randn(40, 3, 6))
        assert all(layer.book.batches == 0 for layer in vq.layers)


@pytest.mark.parametrize("estimator", ["ste", "rotation", "reflection"])
@pytest.mark.parametrize("distance", ["cosine", "angle"])
def test_a_stack_of_one_is_the_layer_for_every_distance(distance, estimator):
    one, z = (
        stack(levels=1, distance=distance, estimator=estimator, frozen=True),
        torch.randn(30, 6),
    )
    layer = VectorQuantizer(
        6, 10, distance=distance, estimator=estimator, frozen=True, channel_first=False
    )
    layer.load_state_dict(one.layers[0].state_dict())
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    outs = one(a), layer(b)
    for out in outs:
        (out.q.sin().sum() + out.loss).backward()
    assert torch.equal(outs[0].q, outs[1].q)
    assert_close(a.grad, b.grad)


def test_a_cosine_stack_with_projections_has_the_gradient_of_the_peers_level():
    torch.manual_seed(0)
    theirs = Theirs(
        dim=6,
        codebook_size=10,
        num_quantizers=1,
        codebook_dim=3,
        use_cosine_sim=True,
        rotation_trick=False,
        route_gradients_to_input=True,
    )
    vq, z = (
        ResidualVQ(
            6, 10, 1, codebook_dim=3, distance="cosine", estimator="ste", channel_first=False
        ),
        torch.randn(2, 20, 6),
    )
    vq.load_state_dict(convert_state_dict(theirs.state_dict()))
    grads = []
    for layer in (vq, theirs):
        leaf = z.clone().requires_grad_()
        layer(leaf)[0].sin().sum().backward()
        grads.append(leaf.grad)
    assert_close(*grads)


def test_a_shared_codebook_is_revived_on_vectors_of_every_level():
    vq, z = stack(size=64, levels=4, shared_codebook=True, revive_after=1), 3 * torch.randn(300, 6)
    vq.learn(), vq(z)
    rows = vq.layers[0].book.collected["rows"].clone()
    seen = [p for _, p, _, _ in copy.deepcopy(vq).eval()._walk(vq._rows(z, None), 4)]
    near = [((rows[:, None] - p).abs().amax(2).amin(1) < 1e-5).sum() for p in seen]
    assert all(n > 5 for n in near) and sum(near) >= 64


def test_a_shared_codebook_that_stands_still_needs_no_learn():
    for options in ({"frozen": True}, {}):
        vq = stack(shared_codebook=True, **options)
        with torch.set_grad_enabled(bool(options)):
            vq(torch.randn(5, 6))


@pytest.mark.slow
def test_two_compiled_passes_of_a_stack_with_the_rule_before_one_backward():
    torch._dynamo.reset()
    vq = stack(estimator="rotation-until-used")
    plain, both = copy.deepcopy(vq), torch.compile(vq, backend="aot_eager")
    grads = []
    for net in (plain, both):
        leaves = [
            torch.randn(8, 6, generator=torch.Generator().manual_seed(i)).requires_grad_()
            for i in range(2)
        ]
        sum(net(x)[0].sin().sum() for x in leaves).backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads):
        assert_close(a, b)


def test_numbers_of_numpy_and_lists_of_batches():
    import numpy as np

    torch._dynamo.reset()
    vq = ResidualVQ(
        np.int64(6),
        np.int32(10),
        np.int64(3),
        codebook_dim=np.int64(4),
        heads=np.int64(1),
        min_quantizers=np.int64(2),
        init="normal",
        channel_first=False,
    )
    vq.learn()
    torch.compile(vq, fullgraph=True, backend="aot_eager")(torch.randn(5, 6))
    z = torch.randn(300, 6)
    parts, whole = stack(size=16), stack(size=16)
    (
        parts.kmeans_init([z[:100], z[100:]], generator=torch.Generator().manual_seed(0)),
        whole.kmeans_init(z, generator=torch.Generator().manual_seed(0)),
    )
    for a, b in zip(parts.layers, whole.layers):
        assert torch.equal(a.codebook, b.codebook)
    with pytest.raises(ValueError, match="mask"):
        parts.kmeans_init([z, z], torch.ones(300, dtype=torch.bool))


def test_attributes_are_checked_where_they_are_used():
    vq, z = stack(codebook_dim=3, projection="each"), torch.randn(4, 5, 6)
    vq.learn()
    vq.reduction = "none"
    assert vq(z).loss.shape == (4, 5, 3)
    with pytest.raises(ValueError, match="reduction is 'typo'"):
        vq.reduction = "typo"
    for name, value in (("gradient", "bogus"), ("skip", 1.5), ("quantizer_dropout", -3)):
        other = copy.deepcopy(vq)
        setattr(other, name, value)
        with pytest.raises(ValueError, match=name):
            other(z)
    product = ProductVQ(6, 10, 2)
    product.estimator, product.reduction, product.automatic = "ste", "none", False
    assert {
        (layer.estimator, layer.reduction, layer.book.automatic) for layer in product.layers
    } == {("ste", "none", False)}
    seen = []
    stack(estimator=lambda p, q: (seen.append(p.shape), q + 0 * p)[1])(z)
    assert seen == [(20, 6)]  # vectors, as the layer hands them on


@pytest.mark.parametrize(
    "options, named",
    [
        ({"num_quantizers": 2.0}, "num_quantizers = 2.0"),
        ({"codebook_size": 8.0}, "codebook_size = 8.0"),
        ({"codebook_size": True}, "codebook_size = True"),
        ({"dim": 4.0}, "dim = 4.0"),
        ({"quantizer_dropout": None}, "quantizer_dropout = None"),
        ({"min_quantizers": 1.5}, "min_quantizers = 1.5"),
        ({"heads": True, "codebook_dim": 2}, "heads = True"),
    ],
)
def test_what_is_no_number_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        ResidualVQ(**{"dim": 4, "codebook_size": 8, "num_quantizers": 3} | options)
