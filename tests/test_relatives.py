"""FSQ and SimVQ as layers: their definitions, an independent implementation, and what every layer
of the family can do."""

import copy
import itertools

import pytest
import torch
import vector_quantize_pytorch as peer
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rotvq import FSQ, SimVQ
from rotvq.layer.lookup import nearest_code

levels = st.lists(st.integers(2, 9), min_size=1, max_size=4)


@given(levels)
def test_fsq_has_each_level_and_each_index_once(levels):
    fsq = FSQ(levels, 6)
    values = [torch.arange(L) - L // 2 for L in levels]
    # far out, each number lands on its first or last level; between, on all of them
    for column, expected in enumerate(values):
        y = torch.zeros(2001, len(levels))
        y[:, column] = torch.linspace(-9, 9, 2001)
        assert fsq.grid(y)[:, column].unique().tolist() == expected.tolist()
    assert torch.equal(
        fsq.grid(torch.full((1, len(levels)), torch.inf))[0],
        torch.stack([v[-1] for v in values]).float(),
    )
    # the index counts the grid
    steps = torch.tensor(levels).cumprod(0) // torch.tensor(levels)
    grid = torch.tensor(list(itertools.product(*(v.tolist() for v in values))))
    indices = ((grid + torch.tensor(levels) // 2) * steps).sum(1)
    assert indices.sort().values.tolist() == list(range(fsq.codebook_size))


@pytest.mark.parametrize("levels", [1000, 1001, 1024, 4096])
def test_many_levels_stay_within_their_range(levels):
    "An ε of their number is a level more, from 1,001 on."
    fsq = FSQ((levels,))
    indices = fsq(torch.tensor([[-50.0], [0.0], [50.0]])).indices
    assert indices.tolist() == [0, levels // 2, levels - 1]


def test_fsq_indices_say_what_is_decoded():
    torch.manual_seed(0)
    fsq, z = FSQ((5, 4), 6, channel_first=True), 3 * torch.randn(2, 6, 8, 8)
    q, indices, loss = fsq(z)
    assert q.shape == z.shape and indices.shape == (2, 8, 8) and loss == 0
    for index in indices.unique():
        same = q.movedim(1, -1)[indices == index]
        assert_close(same, same[:1].expand_as(same))


@pytest.mark.parametrize("levels", [(), (8, 1), (0,), 8])
def test_fsq_says_which_levels_it_cannot_have(levels):
    with pytest.raises(ValueError, match="levels"):
        FSQ(levels, 4)


@pytest.mark.parametrize("autocast", [False, True])
def test_simvq_moves_its_map_and_no_code(autocast):
    torch.manual_seed(0)
    vq, z = SimVQ(6, 32, estimator="rotation"), torch.randn(2, 6, 5, 5, requires_grad=True)
    frozen = vq.frozen.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        q, indices, loss = vq(z)
    codes = frozen @ vq.map.weight.T
    rows = z.movedim(1, -1)
    assert torch.equal(indices, nearest_code(rows, codes.detach()))
    assert_close(q.movedim(1, -1), codes[indices], rtol=1e-6, atol=1e-6)
    assert_close(loss, 1.25 * (rows - codes[indices]).square().mean())
    (loss + q.sum()).backward()
    assert vq.map.weight.grad.abs().sum() > 0 and z.grad.abs().sum() > 0
    assert dict(vq.named_parameters()).keys() == {"map.weight"}


def test_simvq_counts_for_the_rule():
    torch.manual_seed(0)
    vq, z, g = (
        SimVQ(6, 32, estimator="rotation-until-used", commitment=1.0),
        torch.randn(2, 6, 5, 5, requires_grad=True),
        torch.randn(2, 6, 5, 5),
    )
    grads = {}
    for name in ("rotation", "rotation-until-used", "ste"):
        vq.estimator = name
        (grads[name],) = torch.autograd.grad(vq(z).q, z, g)
        if name == "rotation":
            vq.idle.fill_(2**40), vq.latest.zero_()
    assert_close(grads["rotation-until-used"], grads["rotation"])  # no code has been chosen before
    for _ in range(200):
        indices = vq(z).indices  # 160 K vectors, 50 at a time, take 103 batches
    assert (vq.idle == 0).sum() == len(indices.unique()) and (vq.idle > 103).sum() == 32 - len(
        indices.unique()
    )
    vq.estimator = "rotation-until-used"
    # the codes of a linear map are about equally long: none is within reach, and the rule goes
    # straight
    assert torch.equal(torch.autograd.grad(vq(z).q, z, g)[0], grads["ste"])


FAMILY = [
    lambda **o: FSQ((5, 4), 6, **o),
    lambda **o: FSQ((5, 4), 6, heads=2, **o),
    lambda **o: FSQ((5, 4, 3, 3, 4, 3), **o),
    lambda **o: SimVQ(6, 32, **o),
    lambda **o: SimVQ(6, 32, codebook_dim=3, estimator="rotation", **o),
]


def made(make, **options):
    torch.manual_seed(0)
    return make(**options)


@given(
    st.lists(st.integers(3, 9), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 2**31 - 1),
)
def test_fsq_is_that_of_an_independent_implementation(levels, heads, seed):
    torch.manual_seed(seed)
    theirs, ours = (
        peer.FSQ(levels, 6, num_codebooks=heads, keep_num_codebooks_dim=heads > 1),
        FSQ(levels, 6, heads=heads, channel_first=False),
    )
    ours.load_state_dict(theirs.state_dict())
    z = 2 * torch.randn(2, 20, 6)
    q, indices, _ = ours(z)
    expected, found = theirs(z)
    assert torch.equal(indices, found.long())
    assert_close(q, expected)
    assert_close(ours.decode(indices), theirs.indices_to_codes(found))


@pytest.mark.parametrize("make", FAMILY)
def test_both_layouts_maps_volumes_padding_and_empty_batches(make):
    vq, z = made(make, channel_first=False), torch.randn(3, 5, 6)
    q, indices, loss = vq(z)
    assert (
        torch.equal(vq.encode(z), indices)
        and torch.equal(vq.decode(indices), vq.eval()(z).q)
        and torch.equal(vq.indices_to_codes(indices), vq.decode(indices))
    )
    for shape in ((3, 6), (3, 6, 5), (3, 6, 4, 4), (3, 6, 2, 4, 4)):
        first = made(make, channel_first=True)(torch.randn(shape))
        assert first.q.shape == shape and first.indices.shape[: len(shape) - 1] == (3, *shape[2:])
        assert made(make, channel_first=True).decode(first.indices).shape == shape
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False] * 5])
    z[~mask] = torch.nan
    padded = vq(z, mask)
    assert (
        torch.equal(padded.indices[mask], indices[mask])
        and (padded.indices[~mask] == -1).all()
        and (padded.q[~mask] == 0).all()
        and padded.loss.isfinite()
    )
    assert torch.equal(vq.decode(padded.indices)[~mask], torch.zeros(8, 6)) and torch.equal(
        vq.encode(z, mask), padded.indices
    )
    assert vq(z[:0]).q.shape == (0, 5, 6)
    with pytest.raises(ValueError, match="dim = 6"):
        vq(torch.randn(3, 5, 7))
    with pytest.raises(TypeError, match="boolean"):
        vq(torch.randn(3, 5, 6), mask.long())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", FAMILY)
def test_a_model_in_any_dtype(make, dtype):
    vq, z = made(make).to(dtype), torch.randn(2, 6, 3, 4).to(dtype)
    out = vq(z.requires_grad_())
    assert out.q.dtype == dtype and vq.decode(out.indices).dtype == (
        torch.float32 if getattr(vq, "project_in", vq) is None else dtype
    )
    (out.q.sum() + out.loss).backward()
    assert z.grad.dtype == dtype and z.grad.isfinite().all() and z.grad.any()
    plain = made(make)
    assert (plain(z.float()).indices == out.indices).float().mean() > 0.8
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(z.float()).q.dtype == torch.float32


@pytest.mark.parametrize("make", FAMILY)
def test_what_is_not_finite_spoils_no_index(make):
    vq, z = made(make, channel_first=False).train(), torch.randn(4, 6)
    z[1], z[2] = torch.nan, torch.inf
    out = vq(z)
    assert (
        (out.indices >= 0).all()
        and (out.indices < vq.codebook_size).all()
        and out.q[[0, 3]].isfinite().all()
    )


@pytest.mark.parametrize("make", FAMILY)
def test_copied_saved_compiled_and_exported(make):
    vq, z = made(make, channel_first=False).eval(), torch.randn(4, 7, 6)
    expected = vq(z)
    again = made(make, channel_first=False).eval()
    again.load_state_dict(vq.state_dict())
    torch._dynamo.reset()
    for other in (copy.deepcopy(vq), again, torch.compile(vq, fullgraph=True, backend="aot_eager")):
        out = other(z)
        assert torch.equal(out.indices, expected.indices)
        assert_close(out.q, expected.q)
    program = torch.export.export(
        vq,
        (z,),
        dynamic_shapes={"z": {0: torch.export.Dim("b"), 1: torch.export.Dim("t")}},
        strict=False,
    )
    more = torch.randn(3, 5, 6)
    out = program.module()(more)
    assert torch.equal(out[1], vq(more).indices)
    assert_close(out[0], vq(more).q)


def test_what_makes_no_layer_is_refused():
    for make, named in (
        (lambda: FSQ((8, 8), 6, heads=0), "heads = 0"),
        (lambda: FSQ((8, 8), 0), "dim = 0"),
        (lambda: SimVQ(6, 0), "codebook_size = 0"),
        (lambda: SimVQ(6, 8, commitment=-1), "commitment = -1"),
        (lambda: SimVQ(6, 8, codebook_dim=0), "codebook_dim = 0"),
        (lambda: SimVQ(6, 8, estimator="none"), "estimator is 'none'"),
    ):
        with pytest.raises(ValueError, match=named):
            make()


@pytest.mark.parametrize("reentrant", [True, False])
def test_simvq_in_a_checkpoint_counts_once_and_has_the_same_gradient(reentrant):
    from torch.utils.checkpoint import checkpoint

    plain, other = (
        made(lambda **o: SimVQ(6, 64, estimator="rotation-until-used")) for _ in range(2)
    )
    for step in range(4):
        z = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        plain(a).q.sin().sum().backward()
        checkpoint(lambda x: other(x).q, b, use_reentrant=reentrant).sin().sum().backward()
        assert_close(a.grad, b.grad)
    assert torch.equal(plain.idle, other.idle)
    before = plain.idle.clone()
    with torch.no_grad():
        plain(z)
    plain(z[:0]), plain(z[:0])
    assert (
        (plain.idle == before + 1) | (plain.idle == 0)
    ).all()  # the batch before counted, and no other


def test_indices_that_no_relative_gives_are_refused():
    fsq, heads, sim = FSQ((5, 4), 6), FSQ((5, 4), 6, heads=2), SimVQ(6, 32)
    for layer, indices, error, named in (
        (fsq, torch.tensor([20]), IndexError, "up to 20"),
        (sim, torch.tensor([32]), IndexError, "up to 32"),
        (fsq, torch.tensor([3.5]), TypeError, "float32"),
        (sim, torch.tensor([True]), TypeError, "bool"),
        (fsq, [1, 2], TypeError, "list"),
        (heads, torch.tensor([1, 2, 3]), ValueError, "heads = 2"),
    ):
        with pytest.raises(error, match=named):
            layer.decode(indices)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(
            sim.decode(torch.arange(8).to(dtype)), sim.decode(torch.arange(8))
        ) and torch.equal(fsq.decode(torch.arange(8).to(dtype)), fsq.decode(torch.arange(8)))


def test_simvq_decodes_under_autocast_what_it_gave():
    vq, z = made(lambda **o: SimVQ(6, 32, channel_first=False)).eval(), torch.randn(20, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = vq(z)
        assert torch.equal(vq.decode(out.indices), out.q)


@pytest.mark.parametrize(
    "levels, named",
    [
        ((5.0, 4.0), "5.0"),
        ((2.5, 4), "2.5"),
        ((8,) * 21, "more than an index"),
        ((True, 4), "True"),
    ],
)
def test_levels_that_no_index_counts_are_refused(levels, named):
    with pytest.raises(ValueError, match=named):
        FSQ(levels)


def test_many_codes_are_counted_exactly():
    fsq, z = FSQ((7,) * 22), 3 * torch.randn(50, 22)
    out = fsq(z)
    assert (out.indices >= 0).all() and torch.equal(fsq.decode(out.indices), out.q)
