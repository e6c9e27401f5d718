"""The layer: layouts, learning, independence of mode and copies, compilation, bad input."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rotvq import Quantized, VectorQuantizer, learn_after, rotation_trick
from rotvq.layer.exchange import convert_state_dict
from rotvq.layer.lookup import nearest_code
from rotvq.layer.processes import sample_rows
from rotvq.layer.quantizer import ESTIMATORS
from test_estimators import explicit

OPTIONS = {
    "plain": {},
    "cosine": {"distance": "cosine"},
    "learnable": {"learnable": True},
    "learnable cosine": {"learnable": True, "distance": "cosine"},
    "revival": {"revive_after": 1},
    "learnable revival": {"learnable": True, "revive_after": 2},
    "cosine revival": {"distance": "cosine", "revive_after": 1},
    "frozen": {"frozen": True},
    "k-means": {"init": "kmeans"},
}


def layer(**kw):
    torch.manual_seed(0)
    return VectorQuantizer(8, 32, **({"init": "normal"} | kw))


def state_of(vq):
    return {k: v.detach().clone() for k, v in vq.state_dict().items()}


def same(a, b):
    return all(torch.equal(v, b[k]) for k, v in a.items())


def test_returns_unpack_and_value_is_a_code():
    q, indices, loss = out = layer()(torch.randn(5, 7, 8))
    assert (
        isinstance(out, Quantized)
        and q.shape == (5, 7, 8)
        and indices.shape == (5, 7)
        and loss.shape == ()
    )


def test_estimators_share_the_value_and_differ_in_the_gradient():
    torch.manual_seed(1)
    z, g = torch.randn(50, 8), torch.randn(50, 8)
    grads = {}
    for name in ESTIMATORS:
        vq, leaf = layer(estimator=name).eval(), z.clone().requires_grad_()
        q, indices, _ = vq(leaf)
        assert torch.equal(q, vq.codebook[indices])
        grads[name] = torch.autograd.grad(q, leaf, g)[0]
        # the rule is straight-through in a layer that neither learns nor has learned
        assert_close(
            grads[name].double(),
            explicit("ste" if name == "rotation-until-used" else name, z, q.detach(), g),
            rtol=1e-4,
            atol=1e-5,
        )
    assert all(
        (grads[a] - grads[b]).abs().median() > 0.1
        for a, b in (("ste", "rotation"), ("ste", "reflection"), ("rotation", "reflection"))
    )


def test_a_function_of_your_own_is_the_estimator():
    z = torch.randn(5, 8, requires_grad=True)
    vq = layer(estimator=lambda z, q: 3 * z + (q - 3 * z).detach())
    assert (
        torch.autograd.grad(vq(z).q.sum(), z)[0].eq(3).all()
        and vq.estimator_name == "custom:<lambda>"
    )
    assert layer(estimator=rotation_trick).estimator_name == "rotation"


def test_layouts_agree():
    vq, x = layer(), torch.randn(2, 8, 3, 5)
    results = [
        copy.deepcopy(vq)(x),
        copy.deepcopy(vq)(x.permute(0, 2, 3, 1)),
        copy.deepcopy(vq)(x.to(memory_format=torch.channels_last)),
    ]
    assert torch.equal(results[0].q, results[2].q) and torch.equal(
        results[0].q.permute(0, 2, 3, 1), results[1].q
    )
    assert all(torch.equal(r.indices, results[0].indices) for r in results)
    with pytest.raises(ValueError, match="channel_first"):
        vq(torch.randn(2, 8, 3, 8))
    first, last = layer(channel_first=True), layer(channel_first=False)
    square = torch.randn(2, 8, 3, 8)
    assert first(square).indices.shape == (2, 3, 8) and last(square).indices.shape == (2, 8, 3)
    assert first.decode(first.encode(square)).shape == square.shape


def test_commitment_reaches_the_encoder_and_nothing_reaches_the_codebook():
    vq, z = layer(commitment=0.25), torch.randn(20, 8, requires_grad=True)
    before = vq.codebook.clone()
    out = vq(z)
    out.loss.backward()
    assert_close(z.grad, 0.25 * 2 * (z - before[out.indices]).detach() / z.numel())
    assert not list(vq.parameters()) and not vq.codebook.requires_grad


def test_training_moves_the_codebook_and_eval_does_not():
    vq, z = layer(), torch.randn(500, 8)
    start = {k: v.clone() for k, v in vq.state_dict().items()}
    vq.eval()(z)
    assert all(torch.equal(v, start[k]) for k, v in vq.state_dict().items())
    vq.train()(z)
    changed = {k for k, v in vq.state_dict().items() if not torch.equal(v, start[k])}
    assert changed >= {"book.codes", "book.sums", "book.counts"}


@pytest.mark.parametrize("options", OPTIONS)
def test_same_after_copy_pickle_and_state_dict(options):
    vq, z = layer(**OPTIONS[options]), torch.randn(100, 8)
    vq(z)
    other = VectorQuantizer(8, 32, **OPTIONS[options])
    other.load_state_dict(vq.state_dict())
    for twin in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq)), other):
        torch.manual_seed(3)  # revival draws
        a = copy.deepcopy(vq)(z)
        torch.manual_seed(3)
        b = twin(z)
        assert (
            torch.equal(a.q, b.q)
            and torch.equal(a.indices, b.indices)
            and torch.equal(a.loss, b.loss)
        )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "options", [{"estimator": name} for name in ESTIMATORS] + list(OPTIONS.values())[1:], ids=str
)
def test_compiles_whole_and_runs_on_meta(mode, options):
    torch._dynamo.reset()  # each layer is a new variant of one function
    vq, x = layer(**options), torch.randn(2, 8, 4, 4)
    if vq.init == "kmeans":
        vq.kmeans_init(x)
    if mode == "train":
        vq.waited[::2] = 5  # revival, where it is on, acts in this very step
    getattr(vq, mode)()
    twin = copy.deepcopy(vq)
    for net in (vq, twin):
        net.learn()  # from now on they learn when they are told to
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for net, leaf in ((vq, a), (compiled, b)):
        torch.manual_seed(1)
        out = net(leaf)
        (out.q.square().sum() + out.loss).backward()
    for net in (vq, twin):
        net.learn()
    assert b.grad.isfinite().all() and (
        not vq.learnable or vq.frozen or twin.codebook.grad.isfinite().all()
    )
    assert_close(a.grad, b.grad)
    assert_close(vq.state_dict(), twin.state_dict())
    if vq.learnable:
        assert_close(vq.codebook.grad, twin.codebook.grad)
    on_meta = layer(**options).to("meta")
    getattr(on_meta, mode)()
    for _ in range(2):
        assert on_meta(x.to("meta")).q.shape == x.shape
    if mode == "train":
        on_meta.learn()


def test_autocast_and_half_inputs_keep_the_codebook_in_float32():
    vq, x = layer(), torch.randn(4, 10, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = vq(x.bfloat16())
    assert out.q.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert all(
        v.dtype == torch.float32 for k, v in vq.state_dict().items() if v.is_floating_point()
    )


def test_empty_input_changes_nothing():
    vq = layer()
    before = copy.deepcopy(vq.state_dict())
    out = vq(torch.zeros(0, 8, requires_grad=True))
    assert out.q.shape == (0, 8) and out.loss == 0
    assert all(torch.equal(v, before[k]) for k, v in vq.state_dict().items())


def test_kmeans_init_lowers_the_error():
    vq, z = VectorQuantizer(8, 32), torch.randn(1000, 8)
    before = vq.eval()(z).loss
    vq.kmeans_init(z, generator=torch.Generator().manual_seed(0))
    again = VectorQuantizer(8, 32)
    again.kmeans_init(z, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vq.codebook, again.codebook)
    assert vq(z).loss < 0.7 * before and len(vq(z).indices.unique()) > 25


@pytest.mark.parametrize(
    "kw, word",
    [
        (dict(dim=0), "dim = 0"),
        (dict(codebook_size=0), "codebook_size = 0"),
        (dict(decay=1.0), "decay = 1.0"),
        (dict(decay=-0.1), "decay"),
        (dict(commitment=-1), "commitment"),
        (dict(estimator="nope"), "nope"),
        (dict(init="zeros"), "zeros"),
        (dict(distance="l1"), "l1"),
        (dict(revive_after=0), "revive_after = 0"),
        (dict(revive_after=2.5), "2.5"),
        (dict(revive_after=True), "True"),
        (dict(decay=float("nan")), "decay = nan"),
        (dict(commitment=float("nan")), "commitment = nan"),
    ],
)
def test_bad_settings_are_refused(kw, word):
    with pytest.raises(ValueError, match=word):
        VectorQuantizer(**(dict(dim=4, codebook_size=8) | kw))


def test_bad_input_is_refused():
    vq = layer()
    with pytest.raises(ValueError, match=r"\(2, 9\).*dim = 8"):
        vq(torch.zeros(2, 9))
    with pytest.raises(TypeError, match="int64"):
        vq(torch.zeros(2, 8, dtype=torch.int64))
    for bad in (torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(TypeError, match="integers"):
            vq.decode(bad)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_decode_takes_any_integers(dtype):
    vq = layer()
    assert torch.equal(vq.decode(torch.tensor([[1, 3]], dtype=dtype)), vq.codebook[[1, 3]][None])


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_a_decoder_may_begin_in_place(estimator):
    layer = VectorQuantizer(4, 16, estimator=estimator)
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.nn.functional.relu(layer(z).q, inplace=True).sum().backward()
    assert z.grad.isfinite().all()


# Masks


@pytest.mark.parametrize("options", OPTIONS)
def test_padding_counts_for_nothing(options):
    gen = torch.Generator().manual_seed(0)
    z, mask = torch.randn(4, 30, 8, generator=gen), torch.rand(4, 30, generator=gen) < 0.6
    alone, padded = layer(**OPTIONS[options]), layer(**OPTIONS[options])
    leaf, leaf_alone = (
        torch.where(mask[..., None], z, torch.nan).requires_grad_(),
        z[mask].requires_grad_(),
    )
    torch.manual_seed(1)
    a = alone(leaf_alone)
    torch.manual_seed(1)
    b = padded(leaf, mask)
    assert torch.equal(b.indices[mask], a.indices) and b.indices[~mask].eq(-1).all()
    assert torch.equal(padded.encode(leaf, mask) >= 0, mask)
    assert torch.equal(b.q[mask], a.q) and b.q[~mask].eq(0).all()
    assert_close(a.loss, b.loss)
    assert_close(state_of(alone), state_of(padded))
    (a.q.square().sum() + a.loss).backward(), (b.q.square().sum() + b.loss).backward()
    assert_close(leaf.grad[mask], leaf_alone.grad)
    assert leaf.grad[~mask].eq(0).all()


def test_vectors_are_taken_whatever_channel_first_says():
    z = torch.randn(4, 8)
    assert torch.equal(layer(channel_first=True)(z).q, layer()(z).q)


def test_masks_of_feature_maps_and_masks_that_do_not_fit():
    vq, x, mask = layer(), torch.randn(2, 8, 3, 5), torch.rand(2, 3, 5) < 0.5
    assert torch.equal(vq(x, mask).indices >= 0, mask)
    with pytest.raises(ValueError, match=r"\(2, 15\).*\(2, 3, 5\)"):
        vq(x, mask.view(2, 15))
    with pytest.raises(TypeError, match="float32.*boolean"):
        vq(x, mask.float())


@pytest.mark.parametrize("options", OPTIONS)
def test_an_all_padding_batch_changes_nothing(options):
    vq = layer(**OPTIONS[options])
    before, z = state_of(vq), torch.randn(2, 10, 8, requires_grad=True)
    out = vq(z, torch.zeros(2, 10, dtype=torch.bool))
    (out.q.sum() + out.loss).backward()
    assert out.loss == 0 and out.q.eq(0).all() and out.indices.eq(-1).all() and z.grad.eq(0).all()
    assert same(state_of(vq), before)


def test_decode_gives_zero_for_padding():
    vq, z, mask = (
        layer().eval(),
        torch.randn(2, 6, 8),
        torch.tensor([[True] * 4 + [False] * 2, [True] * 6]),
    )
    out = vq(z, mask)
    assert torch.equal(vq.decode(out.indices), out.q)


# Input that is not finite


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_with_nan_leaves_the_codebook_untouched(options, value):
    vq = layer(**OPTIONS[options])
    if vq.init != "kmeans":
        vq(torch.randn(40, 8))
    before, z = state_of(vq), torch.randn(40, 8)
    z[7, 3] = value
    out = vq(z.requires_grad_())
    assert not out.loss.isfinite() and out.q.isfinite().all()  # noticed, but not spread
    if vq.init == "kmeans":
        assert state_of(vq)["book.codes"].isfinite().all()  # placed on the good vectors
    elif vq.learnable:  # counts and revival go on with good vectors; so does the optimizer
        assert state_of(vq)["book.codes"].isfinite().all()
        out.loss.backward()
        assert vq.codebook.grad.isfinite().all()
    else:
        assert same(state_of(vq), before)


def test_a_kmeans_start_waits_for_a_good_batch():
    vq = layer(init="kmeans")
    vq(torch.full((10, 8), torch.nan))
    assert not vq.ready
    vq(torch.randn(100, 8))
    assert vq.ready and vq.usage() > 0.8
    with pytest.raises(ValueError, match="frozen"):
        layer(init="kmeans", frozen=True)
    with pytest.raises(ValueError, match="0 batches"):
        layer().kmeans_init([])
    with pytest.raises(ValueError, match="2 batches and a mask"):
        layer().kmeans_init([torch.randn(9, 8)] * 2, torch.ones(9, dtype=torch.bool))
    with pytest.warns(UserWarning, match="5 vectors, of which 5 differ, for 32 codes"):
        layer(init="kmeans")(torch.randn(5, 8))


def test_the_state_decides_whether_a_kmeans_start_is_to_be_made():
    fresh, placed = layer(init="kmeans").state_dict(), layer(init="kmeans")
    placed(torch.randn(100, 8))
    placed.load_state_dict(fresh)
    before = placed.codebook.clone()
    placed(torch.randn(100, 8) + 50)
    assert placed.ready and placed.codebook.mean() > 40 > before.mean()  # started again, far away
    with pytest.raises(ValueError, match="finite"):
        layer().kmeans_init(torch.full((3, 8), torch.nan))


# Learning


def test_codebook_loss_and_commitment_of_a_learnable_codebook():
    for distance in ("euclidean", "cosine"):
        vq, z = (
            layer(learnable=True, commitment=0.25, distance=distance).double(),
            torch.randn(50, 8, dtype=torch.float64, requires_grad=True),
        )
        out, leaf = vq(z), z.detach().clone().requires_grad_()
        unit = (
            (lambda v: v) if distance == "euclidean" else lambda v: v / v.norm(dim=1, keepdim=True)
        )
        codebook = vq.codebook.detach().clone().requires_grad_()
        zn, q = unit(leaf), unit(codebook)[out.indices]
        loss = (zn.detach() - q).square().mean() + 0.25 * (zn - q.detach()).square().mean()
        assert_close(out.loss, loss)
        assert_close(
            torch.autograd.grad(out.loss + 0 * out.q.sum(), (z, vq.codebook)),
            torch.autograd.grad(loss, (leaf, codebook)),
        )
        assert (
            torch.autograd.grad(vq(z).q.sum(), vq.codebook, allow_unused=True)[0] is None
        )  # the decoder does not train it


def test_a_learnable_codebook_trains():
    vq, z = layer(learnable=True), torch.randn(500, 8)
    opt = torch.optim.Adam(vq.parameters(), 0.05)
    losses = []
    for _ in range(60):
        losses.append(vq(z).loss)
        opt.zero_grad(), losses[-1].backward(), opt.step()
    assert losses[-1] < 0.8 * losses[0] and "book.sums" not in vq.state_dict()


@pytest.mark.parametrize("options", OPTIONS)
def test_frozen_and_eval_change_nothing(options):
    vq, z = layer(**OPTIONS[options]), torch.randn(200, 8, requires_grad=True)
    before = state_of(vq)
    vq.eval()(z)
    vq.train().frozen = True
    out = vq(z)
    assert same(state_of(vq), before)
    if vq.learnable:
        assert torch.autograd.grad(out.loss, vq.codebook, allow_unused=True)[0] is None
    vq.frozen = False
    vq(z)
    assert not same(state_of(vq), before)


def test_unused_codes_are_revived_and_used_ones_left_alone():
    torch.manual_seed(0)
    vq = VectorQuantizer(2, 8, init="normal", revive_after=3)
    vq.codebook.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]] + [[100.0, 100.0]] * 6))
    vq.sums.copy_(vq.codebook)
    z = torch.rand(64, 2)
    for step in range(2):
        vq(z)
        assert vq.waited[2:].eq(step + 1).all() and (z[:, None] != vq.codebook[2:]).any(-1).all()
    vq(z)  # placed on its vectors, when it is learned from
    used, before = vq.codebook[:2].clone(), vq.usage(within=100)
    assert vq.waited.eq(0).all() and vq.counts[2:].eq(1).all()
    out = vq(z)
    fresh = out.q.unique(dim=0)
    assert before == 0.25 and vq.usage() == 1 and vq.waited.eq(0).all()
    on_a_vector = (fresh[:, None] == z).all(-1).any(1)
    assert (
        on_a_vector.sum() == 6 and (fresh[~on_a_vector].sort(0).values == used.sort(0).values).all()
    )  # the others were left alone


def test_revival_of_a_learnable_cosine_codebook_trains_when_compiled():
    torch._dynamo.reset()
    torch.manual_seed(0)
    vq = VectorQuantizer(8, 64, learnable=True, distance="cosine", revive_after=2)
    step, opt = (
        torch.compile(vq, fullgraph=True, backend="aot_eager"),
        torch.optim.AdamW(vq.parameters(), 1e-2),
    )
    learn_after(vq, opt)
    for _ in range(6):
        loss = step(torch.randn(30, 8)).loss
        opt.zero_grad(), loss.backward(), opt.step()
    assert loss.isfinite() and vq.codebook.isfinite().all()


@given(seed=st.integers(0, 10**6), n=st.integers(0, 30), count=st.integers(1, 40))
def test_drawn_rows_are_usable_and_repeat_only_when_they_must(seed, n, count):
    gen = torch.Generator().manual_seed(seed)
    z, usable = torch.randn(n, 3, generator=gen), torch.rand(n, generator=gen) < 0.5
    rows, some = sample_rows(z, usable, count, torch.tensor(seed))
    assert rows.shape == (count, 3) and some == usable.any()
    if some:
        assert (rows[:, None] == z[usable]).all(-1).any(1).all()
        assert len(rows.unique(dim=0)) == min(count, int(usable.sum()))


def test_kmeans_start_happens_once_and_survives_saving():
    vq, z = layer(init="kmeans"), torch.randn(300, 8)
    uniform = vq.codebook.clone()
    vq.eval()(z)
    assert torch.equal(vq.codebook, uniform) and not vq.ready  # eval: the uniform codes serve
    vq.train()(z)
    assert vq.ready and vq.usage() > 0.9
    other = VectorQuantizer(8, 32, init="kmeans", decay=0.999)
    other.load_state_dict(vq.state_dict())
    other(torch.rand(100, 8) / 100)  # no second start
    assert (other.codebook - vq.codebook).abs().max() < 0.1 < vq.codebook.abs().max()
    few = VectorQuantizer(8, 32, init="kmeans")
    with pytest.warns(UserWarning):
        few(z[:5])
    assert few.codebook.isfinite().all() and len(few.encode(z[:5]).unique()) == 5


def test_kmeans_init_takes_several_batches_and_masks():
    z = torch.randn(60, 8)
    a, b, c = layer(), layer(), layer()
    seed = lambda: torch.Generator().manual_seed(0)
    a.kmeans_init(z, generator=seed())
    b.kmeans_init([z[:10], z[10:]], generator=seed())
    c.kmeans_init(
        torch.cat([z, torch.full((5, 8), torch.nan)])[None],
        torch.arange(65)[None] < 60,
        generator=seed(),
    )
    assert torch.equal(a.codebook, b.codebook) and torch.equal(a.codebook, c.codebook)


# Types, devices and what it says


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_in_another_dtype(options, dtype):
    vq, z = layer(**OPTIONS[options]).to(dtype), torch.randn(3000, 8).to(dtype).requires_grad_()
    for _ in range(2):
        out = vq(z)
        (out.q.float().sum() + out.loss).backward()
    assert out.q.dtype == dtype and out.q.isfinite().all() and z.grad.isfinite().all()
    assert vq.codebook.dtype == dtype and vq.counts.dtype == torch.promote_types(
        dtype, torch.float32
    )
    if options == "plain":
        assert torch.equal(vq.eval()(z).q, vq.codebook[vq.encode(z)])


def test_a_kmeans_start_that_half_precision_cannot_hold_changes_nothing():
    vq = VectorQuantizer(4, 8).half()
    before = {name: state.clone() for name, state in vq.state_dict().items()}
    with pytest.raises(ValueError, match="float16 of the codebook"):
        vq.kmeans_init(1e6 * torch.randn(100, 4))
    assert all(torch.equal(state, before[name]) for name, state in vq.state_dict().items())


@pytest.mark.slow
def test_running_sums_of_a_half_precision_layer_neither_stall_nor_overflow():
    for dtype in (torch.float16, torch.bfloat16):
        vq, full = layer(decay=0.99).to(dtype), layer(decay=0.99)
        z = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0)) / 10
        for _ in range(30):
            vq(z.to(dtype)), full(z.to(dtype).float())
        assert vq.codebook.isfinite().all()
        assert_close(vq.counts, full.counts, rtol=1e-3, atol=20)  # kept in bfloat16: off by 170


def test_gradients_by_torch_func_and_in_batches():
    vq, z = layer().eval(), torch.randn(20, 8)
    loss = lambda z: vq(z).q.square().sum() + vq(z).loss
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(torch.func.grad(loss)(z), expected)
    out = vq(leaf).loss
    (batched,) = torch.autograd.grad(out, leaf, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    assert_close(batched[1], 2 * batched[0])
    double = layer().eval().double()
    torch.autograd.gradgradcheck(lambda z: double(z).loss, z[:3].double().requires_grad_())


def test_warns_once_and_only_where_lambda_matters():
    def warned(scale, **options):
        vq = layer(learnable=True, **options)
        vq.codebook.data.mul_(scale)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(25):
                vq(torch.randn(64, 8))
        assert all(w.filename == __file__ for w in seen)  # it points to the caller
        return [str(w.message) for w in seen]

    for name in ("rotation", "reflection"):
        (small,) = warned(1e-3, estimator=name)
        (large,) = warned(1e3, estimator=name)
        assert "kmeans" in small and "e-0" in small and "e+0" in large
    for options in (dict(estimator="ste"), dict(distance="cosine"), dict(estimator=lambda z, q: q)):
        assert not warned(1e-3, **options)
    assert not warned(1)


def test_diagnosis_against_explicit_angles():
    vq, z = layer().double(), torch.randn(2, 50, 8, dtype=torch.float64)
    z[0, 0] = 0
    before = state_of(vq)
    seen = vq.diagnose(z)
    flat = z.reshape(-1, 8)
    q = vq.codebook[nearest_code(flat, vq.codebook)]
    assert seen.theta[0].isnan() and seen.lam[0].isnan()
    cosine = torch.nn.functional.cosine_similarity(flat, q)
    assert_close(seen.theta[1:], cosine.clamp(-1, 1).arccos()[1:])
    assert_close(seen.lam[1:], (q.norm(dim=1) / flat.norm(dim=1))[1:])
    assert_close(seen.quantization_error, (flat - q).square().mean())
    assert seen.usage == len(vq.encode(z).unique()) / 32 and 1 < seen.perplexity <= 32
    assert same(state_of(vq), before) and vq.training
    assert_close(layer(distance="cosine").diagnose(torch.randn(20, 8)).lam, torch.ones(20))


def test_usage_and_perplexity_of_the_layer():
    vq = layer(decay=0.9)
    assert vq.usage(within=1000) == 0
    vq(vq.codebook[:8].repeat(3, 1))
    assert vq.usage() == 0.25
    vq(vq.codebook[8:12].clone())
    assert vq.usage() == 0.125 and vq.usage(within=2) == 0.375
    vq.counts.copy_(torch.tensor([0.5] * 8 + [0.0] * 24))
    assert vq.perplexity() == pytest.approx(8)


def test_repr_says_what_differs_from_the_defaults():
    assert repr(VectorQuantizer(4, 8)) == "VectorQuantizer(4, 8, estimator=rotation)"
    text = repr(
        VectorQuantizer(
            4,
            8,
            estimator="ste",
            distance="cosine",
            learnable=True,
            revive_after=9,
            channel_first=True,
        )
    )
    assert all(
        word in text
        for word in (
            "estimator=ste",
            "distance=cosine",
            "learnable=True",
            "revive_after=9",
            "channel_first=True",
        )
    )


# Against vector_quantize_pytorch


@pytest.mark.parametrize("kind", ["euclidean", "cosine", "learnable"])
def test_converted_state_gives_equal_indices_and_values(kind):
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    more = {
        "euclidean": {},
        "cosine": {"use_cosine_sim": True},
        "learnable": {"learnable_codebook": True, "ema_update": False},
    }[kind]
    theirs = VectorQuantize(8, 32, **more)
    for _ in range(5):
        theirs(torch.randn(4, 100, 8))
    ours = VectorQuantizer(
        8, 32, learnable=kind == "learnable", distance="cosine" if kind == "cosine" else "euclidean"
    )
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), learnable=kind == "learnable"))
    z = torch.randn(4, 100, 8, requires_grad=True)
    for mode in ("eval", "train"):
        getattr(ours, mode)(), getattr(theirs, mode)()
        (q, indices, loss), (q_, indices_, loss_) = ours(z), theirs(z)
        assert torch.equal(indices, indices_)
        assert_close(q, q_, rtol=1e-3, atol=1e-4)
    if kind == "learnable":
        assert_close(loss, 2 * loss_.squeeze())  # theirs: one term, whose gradient goes both ways
    else:
        assert_close(loss, loss_.squeeze())
    if kind != "learnable":
        assert_close(ours.codebook, theirs.codebook, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_masked_step_equals_theirs(distance):
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    ours, theirs = (
        layer(distance=distance),
        VectorQuantize(8, 32, use_cosine_sim=distance == "cosine", rotation_trick=False),
    )
    theirs._codebook.embed.copy_(ours.codebook), theirs._codebook.embed_avg.copy_(ours.codebook)
    for _ in range(10):
        z, mask = torch.randn(4, 40, 8), torch.rand(4, 40) < 0.7
        a, b = ours(z, mask), theirs(z, mask=mask)
        assert torch.equal(a.indices, b[1])
        assert_close(a.q, b[0], rtol=1e-4, atol=1e-5)
        assert_close(
            a.loss,
            (a.q - (z if distance == "euclidean" else torch.nn.functional.normalize(z, dim=-1)))[
                mask
            ]
            .square()
            .mean(),
        )
        if distance == "euclidean":
            assert_close(a.loss, b[2].squeeze())  # theirs forgets to normalize z under a mask
        assert_close(ours.codebook, theirs.codebook, rtol=1e-4, atol=1e-5)


def test_layers_of_a_stack_draw_different_rows():
    """Else a level of a residual stack would revive its codes where the one before has left nothing
    over."""
    torch.manual_seed(0)
    levels = [VectorQuantizer(4, 32, revive_after=1) for _ in range(3)]
    z = torch.randn(500, 4)
    for level in levels:
        level.waited.fill_(5), level(z)
    placed = [level.codebook for level in levels]
    assert len({level.salt.item() for level in levels}) == 3
    assert not torch.equal(placed[0], placed[1]) and not torch.equal(placed[1], placed[2])


@pytest.mark.slow
def test_the_rows_drawn_are_balanced_for_small_codebooks():
    for n, count in ((16, 2), (16, 4), (16, 8), (16, 16)):
        drawn = torch.stack(
            [
                sample_rows(
                    torch.arange(float(n))[:, None],
                    torch.ones(n, dtype=torch.bool),
                    count,
                    torch.tensor(seed),
                )[0][:, 0]
                for seed in range(1000)
            ],
            1,
        )
        for often in drawn.long():
            assert (often.bincount(minlength=n) / 1000 - 1 / n).abs().max() < 0.035


@pytest.mark.parametrize("options", OPTIONS)
def test_two_forwards_before_one_backward(options):
    vq = layer(**OPTIONS[options])
    z = torch.randn(40, 8, requires_grad=True)
    a, b = vq(z), vq(2 * z)
    (a.q.square().sum() + a.loss + b.q.square().sum() + b.loss).backward()
    assert z.grad.isfinite().all()


def test_arrays_of_numpy_are_refused_by_name():
    vq = layer()
    for call, array in ((vq.decode, np.array([1])), (vq, np.zeros((2, 8), "float32"))):
        with pytest.raises(TypeError, match="ndarray"):
            call(array)
