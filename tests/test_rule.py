"""The rule, rotation until the codes are used: its gradient, its weight; and skip, samples that
pass by the lookup."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from rotvq import VectorQuantizer, convert_state_dict, learn_after, rotation_trick, straight_through
from rotvq.layer.learning import NEVER_CHOSEN, UNUSED_AFTER, rotation_until_used
from rotvq.layer.quantizer import ESTIMATORS, TITLES, skips, takes_weight
from test_estimators import DTYPES, draw, explicit, gradient
from test_quantizer import state_of

RULE = "rotation-until-used"


# The gradient


@pytest.mark.parametrize("d", [1, 2, 3, 8, 31, 64])
@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 0.03])
def test_gradient_is_its_formula(d, w):
    z, q, g = draw(d, 300, d, dtype=torch.float64)
    q = 3 * q
    # in one dimension there is no plane to turn in: λ g where the signs agree, else −λ g
    rotated = explicit("rotation", z, q, g) if d > 1 else q.abs() / z.abs() * g * (z * q).sign()
    assert_close(
        gradient(rotation_until_used, z, q, g, weight=w),
        w * rotated + (1 - w) * g,
        rtol=1e-9,
        atol=1e-9,
    )


@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 64),
    w=st.floats(0, 1),
    lead=st.sampled_from([(), (5,), (2, 3), (0,)]),
    dtype=st.sampled_from(DTYPES),
)
def test_value_and_gradient_in_any_dtype(seed, d, w, lead, dtype):
    z, q, g = draw(seed, *lead, d, dtype=dtype)
    out = rotation_until_used(z.requires_grad_(), q, w)
    assert (
        out.dtype == dtype
        and torch.equal(out, q)
        and out.data_ptr() != q.data_ptr()
        or not q.numel()
    )
    (ours,) = torch.autograd.grad(out, z, g)
    parts = w * gradient(rotation_trick, z, q, g).double(), (1 - w) * g.double()
    size = 1 + sum(part.abs().max().item() for part in parts) if g.numel() else 1
    assert_close(ours.double(), sum(parts), rtol=0, atol=4 * torch.finfo(dtype).eps * size)


def test_a_weight_for_each_vector():
    z, q, g = draw(4, 2, 3, 5)
    w = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    rows = [
        gradient(rotation_until_used, *(v[i, j] for v in (z, q, g)), weight=w[i, j].item())
        for i in range(2)
        for j in range(3)
    ]
    assert_close(gradient(rotation_until_used, z, q, g, weight=w), torch.stack(rows).view(2, 3, 5))
    assert_close(
        torch.func.vmap(functools.partial(gradient_of, weight=w[0]))(z, q, g)[0],
        gradient(rotation_until_used, z, q, g, weight=w[:1])[0],
    )
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\)"):
        rotation_until_used(z, q, w.T)


def gradient_of(z, q, g, weight):
    return torch.func.vjp(lambda z: rotation_until_used(z, q, weight), z)[1](g)[0]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_the_ends_are_the_two_estimators_bit_for_bit(bad):
    z, q, g = draw(0, 500, 7)
    for at, to in ((0, straight_through), (1, rotation_trick)):
        assert torch.equal(gradient(rotation_until_used, z, q, g, weight=at), gradient(to, z, q, g))
    # selected, not multiplied by 0: what is not asked for may be infinite
    z[3], g[5, 2] = 0, bad
    q[4] = bad
    assert torch.equal(
        gradient(rotation_until_used, z, q, g, weight=torch.tensor(0.0)).nan_to_num(7),
        g.nan_to_num(7),
    )
    rotated = gradient(rotation_trick, z, q, g)
    assert torch.equal(
        gradient(rotation_until_used, z, q, g, weight=torch.tensor(1.0)).nan_to_num(7),
        rotated.nan_to_num(7),
    )


def test_a_weight_for_each_vector_and_vectors_along_another_dimension():
    z, q, g = draw(1, 4, 5, 6)
    w = torch.rand(4, 5).round(decimals=1)
    rotated = gradient(rotation_trick, z, q, g)
    expected = w[..., None] * rotated + (1 - w[..., None]) * g
    assert_close(gradient(rotation_until_used, z, q, g, weight=w), expected)
    turned = (v.movedim(-1, 1) for v in (z, q, g))
    assert_close(gradient(rotation_until_used, *turned, weight=w, dim=1), expected.movedim(-1, 1))


def test_transforms_second_derivatives_and_devices():
    z, q, g = draw(2, 6, 8, 5, dtype=torch.float64)
    w = torch.tensor(0.3, dtype=torch.float64)
    trick = lambda z, q: rotation_until_used(z, q, w)
    expected = gradient(trick, z, q, g)
    assert_close(
        gradient(torch.compile(trick, fullgraph=True, backend="aot_eager"), z, q, g), expected
    )
    pull = lambda z, q, g: torch.func.vjp(lambda z: trick(z, q), z)[1](g)[0]
    assert_close(torch.func.vmap(pull)(z, q, g), expected)
    # forward mode has the transposed Jacobian: ⟨u, Jᵀg⟩ = ⟨J u, g⟩
    u = torch.randn_like(z)
    _, pushed = torch.func.jvp(lambda z: trick(z, q), (z,), (u,))
    assert_close((u * expected).sum(), (pushed * g).sum())
    # a double backward pass: the gradient is linear in g
    h = g.clone().requires_grad_()
    point = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(trick(point, q), point, h, create_graph=True)
    assert_close(torch.autograd.grad(first, h, u)[0], pushed)
    meta = z.to("meta").requires_grad_()
    assert (
        torch.autograd.grad(rotation_until_used(meta, q.to("meta"), 0.5), meta, g.to("meta"))[
            0
        ].shape
        == z.shape
    )


# The weight


def naive_weight(chosen: list, codes, batch: int) -> float:
    """Share of codes without a choice in the last W batches, and less than a quarter as long as the
    others."""
    size = len(codes)
    window = math.ceil(UNUSED_AFTER * size / batch)
    used = {k for indices in chosen[-window:] for k in indices.tolist()}
    if not used:
        return 1.0
    length = codes.double().norm(dim=1)
    long = length[list(used)].mean()
    return sum(k not in used and length[k] < long / 4 for k in range(size)) / size


@pytest.mark.parametrize(
    "options",
    [{}, {"learnable": True}, {"distance": "cosine"}, {"revive_after": 7}, {"decay": 0.3}],
    ids=str,
)
def test_weight_is_the_share_of_unused_codes_within_reach(options):
    torch.manual_seed(0)
    vq, chosen, weights, n = (
        VectorQuantizer(4, 32, estimator=RULE, **options),
        [],
        [],
        512,
    )  # a window of ten batches
    opt = torch.optim.SGD([*vq.parameters(), torch.zeros(1, requires_grad=True)], 0.1)
    learn_after(vq, opt)
    for step in range(60):
        spread = (
            0.01 if step < 20 else 1.0 if step < 40 else 0.05
        )  # codes come into use, and fall out of it
        z = torch.tensor([1.0, 0, 0, 0]) + spread * torch.randn(
            n, 4, generator=torch.Generator().manual_seed(step)
        )
        weights.append((vq.rotation_weight().item(), naive_weight(chosen, vq.codebook.detach(), n)))
        out = vq(z.requires_grad_())
        opt.zero_grad(), (out.q.square().mean() + out.loss).backward(), opt.step()
        chosen.append(out.indices)
    ours, naive = zip(*weights)
    # batches are of one size from the first on; the running average of their size needs some to
    # know it
    assert ours[:2] == naive[:2] and ours[14:] == naive[14:]
    assert ours[0] == 1 and (max(ours[20:]) > 0.1 or options.keys() & {"distance", "revive_after"})
    if options in ({}, {"decay": 0.3}):
        assert min(ours[30:40]) < 0.2 < max(ours[10:20])


def test_gradient_of_the_layer_is_that_of_its_weight():
    torch.manual_seed(0)
    vq, z, g = VectorQuantizer(6, 64, estimator=RULE), torch.randn(8, 6), torch.randn(8, 6)
    seen = []
    for step in range(4):
        w, point = vq.rotation_weight(), (z + step / 5).requires_grad_()
        q = vq(point).q
        (grad,) = torch.autograd.grad(q, point, g)
        assert_close(grad, gradient(rotation_until_used, point, q.detach(), g, weight=w))
        seen.append(w.item())
    assert seen[0] == 1 and 0 < seen[-1] < 1


def test_before_anything_was_learned():
    """1 in training; 0 for a layer that does not learn, frozen or in eval mode; then what the
    counters say."""
    vq = VectorQuantizer(4, 16, estimator=RULE)
    assert vq.rotation_weight() == 1 and vq.eval().rotation_weight() == 0
    vq.train().frozen = True
    assert vq.rotation_weight() == 0
    vq.frozen = False
    vq(torch.ones(50, 4))
    held = vq.rotation_weight()
    assert 0 < held < 1 and vq.eval().rotation_weight() == held
    vq.train().frozen = True
    assert vq.rotation_weight() == held
    # a converted layer begins as in training, with the first batch to count
    theirs = pytest.importorskip("vector_quantize_pytorch").VectorQuantize(4, 16)
    vq = VectorQuantizer(4, 16, estimator=RULE)
    vq.load_state_dict(convert_state_dict(theirs.state_dict()))
    assert (
        vq.rotation_weight() == 1
        and (vq.idle == NEVER_CHOSEN).all()
        and vq.eval().rotation_weight() == 0
    )


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.vq, self.after = (
            nn.Linear(8, 6),
            VectorQuantizer(6, 64, estimator=RULE, **options),
            nn.Linear(6, 8),
        )

    def forward(self, x):
        q, _, loss = self.vq(self.before(x))
        return (self.after(q) - x).square().mean() + loss


def training(net, step=None, parts=1, steps=8):
    "Losses of a training, and the state after it."
    opt = torch.optim.SGD(net.parameters(), 0.3)
    learn_after(net, opt)
    losses, step = [], net if step is None else step
    for k in range(steps):
        opt.zero_grad()
        x = torch.randn(24, 5, 8, generator=torch.Generator().manual_seed(k))
        for part in x.chunk(parts):
            loss = step(part) / parts
            loss.backward()
            losses.append(loss.detach())
        opt.step()
    return torch.stack(losses).reshape(steps, parts).sum(1), state_of(net)


@pytest.mark.parametrize("options", [{}, {"skip": 0.4}, {"learnable": True, "skip": 0.4}], ids=str)
def test_parts_checkpoints_and_graphs_train_alike(options):
    losses, state = training(Net(**options))
    assert len(losses.unique()) == len(losses)
    others = {} if "skip" in options else {"parts": training(Net(**options), parts=3)}
    net = Net(**options)
    others["checkpoint"] = training(net, lambda x: checkpoint(net, x, use_reentrant=False))
    torch._dynamo.reset()
    net = Net(**options)
    others["graph"] = training(net, torch.compile(net, fullgraph=True, backend="aot_eager"))
    for name, (their_losses, theirs) in others.items():
        assert_close(their_losses, losses, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
        for key, value in state.items():
            assert_close(
                theirs[key], value, rtol=1e-4, atol=1e-4, msg=lambda m: f"{name}, {key}: {m}"
            )


def test_an_estimator_of_your_own_may_take_the_weight():
    seen = []

    def own(z, q, weight):
        seen.append(weight)
        return straight_through(z, q)

    vq = VectorQuantizer(4, 16, estimator=own)
    for _ in range(3):
        vq(torch.randn(40, 4))
    assert [w.shape for w in seen] == [()] * 3 and seen[0] == 1 and seen[-1] < 1
    torch._dynamo.reset()
    vq = VectorQuantizer(
        4, 16, estimator=lambda z, q, weight: rotation_until_used(z, q, weight * 0)
    )
    vq.learn()
    z, g = torch.randn(40, 4, requires_grad=True), torch.randn(40, 4)
    q = torch.compile(vq, fullgraph=True, backend="aot_eager")(z).q
    assert torch.equal(torch.autograd.grad(q, z, g)[0], g)


def test_which_functions_take_the_weight():
    class Own(nn.Module):
        def forward(self, z, q, weight):
            return rotation_until_used(z, q, weight)

    assert takes_weight(Own()) and takes_weight(rotation_until_used) and takes_weight(RULE)
    assert not takes_weight(functools.partial(rotation_until_used, weight=0.0))
    assert not any(
        map(
            takes_weight,
            ("ste", "rotation", straight_through, torch.lerp, nn.Identity(), lambda z, q: q),
        )
    )
    own, named = (VectorQuantizer(4, 16, estimator=estimator) for estimator in (Own(), RULE))
    named.load_state_dict(own.state_dict())
    z, g = torch.randn(40, 4, requires_grad=True), torch.randn(40, 4)
    for _ in range(2):
        a, b = (torch.autograd.grad(vq(z).q, z, g)[0] for vq in (own, named))
        assert torch.equal(a, b)


def test_the_weight_is_not_read_by_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        vq = VectorQuantizer(6, 64, estimator=RULE, skip=0.2)
        vq.learn()
        z = torch.randn(4, 5, 6, requires_grad=True)
        vq(z).q.sum().backward()
        assert z.grad.shape == z.shape


def test_every_list_of_estimators_has_it():
    assert ESTIMATORS.keys() == TITLES.keys() and RULE in ESTIMATORS
    from rotvq.plots import COLORS

    assert COLORS.keys() == ESTIMATORS.keys() and len(set(COLORS.values())) == len(COLORS)


# Skip


@given(
    seed=st.integers(0, 10**6),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    shape=st.sampled_from([(400,), (400, 3), (400, 2, 2)]),
)
def test_the_share_of_samples_is_about_that(seed, share, shape):
    from rotvq.layer.layout import Rows

    rows = Rows.of(
        torch.randn(*shape, 5, generator=torch.Generator().manual_seed(seed)),
        5,
        None,
        False,
        torch.float32,
    )
    chosen = (
        skips(rows, share, torch.tensor(seed)).reshape(shape).flatten(1)
        if len(shape) > 1
        else skips(rows, share, torch.tensor(seed))[:, None]
    )
    assert (chosen == chosen[:, :1]).all()  # samples as a whole
    assert abs(chosen[:, 0].float().mean() - share) < 5 * (share * (1 - share) / 400) ** 0.5
    assert not torch.equal(chosen, skips(rows, share, torch.tensor(seed + 1)).reshape(chosen.shape))


@pytest.mark.parametrize(
    "shape, first",
    [
        ((60, 6), None),
        ((60, 6, 2, 2), True),
        ((60, 4, 6), False),
        ((6,), None),
        ((0, 6), None),
        ((0, 4, 6), False),
    ],
)
def test_a_skipped_sample_is_itself_with_its_exact_gradient(shape, first):
    torch.manual_seed(0)
    z, g = torch.randn(shape, requires_grad=True), torch.randn(shape)
    plain = VectorQuantizer(6, 16, estimator=RULE, channel_first=first)
    vq = copy.deepcopy(plain)
    vq.skip = 0.5
    out, expected = vq(z), plain(z)
    assert torch.equal(out.indices, expected.indices) and torch.equal(out.loss, expected.loss)
    skipped = (out.q == z).flatten(1).all(1) if z.ndim > 1 else (out.q == z).all()[None]
    if not z.numel():
        skipped = torch.zeros(0, dtype=torch.bool)
    if len(z) == 60:
        assert 15 < skipped.sum() < 45
    grads = [torch.autograd.grad(o.q, z, g)[0] for o in (out, expected)]
    for o, e, source in ((out.q, expected.q, z), (*grads, g)):
        where = skipped.reshape(-1, *[1] * (z.ndim - 1)) if z.ndim > 1 else skipped
        assert torch.equal(o, torch.where(where, source, e))
    assert all(torch.equal(a, b) for a, b in zip(state_of(vq).values(), state_of(plain).values()))
    vq.eval(), plain.eval()
    assert torch.equal(vq(z).q, plain(z).q)  # in training only


def test_padding_stays_zero_and_the_cosine_passes_unit_vectors():
    torch.manual_seed(0)
    z, mask = torch.randn(40, 5, 6), torch.rand(40, 5) < 0.6
    vq = VectorQuantizer(6, 16, skip=1.0, distance="cosine")
    q = vq(z, mask).q
    assert (q[~mask] == 0).all()
    assert_close(q[mask], nn.functional.normalize(z[mask], dim=-1))


def test_parts_of_a_batch_skip_the_same_samples():
    vq, z = VectorQuantizer(6, 16, skip=0.5), torch.randn(60, 3, 6)
    vq.learn()
    whole, parts = vq(z).q, [vq(part).q for part in z.split(7)]
    assert torch.equal(torch.cat(parts), whole)
    vq.learn()
    again = (vq(z).q == z).flatten(1).all(1)
    assert not torch.equal(again, (whole == z).flatten(1).all(1))  # in the next batch others
    other = VectorQuantizer(6, 16, skip=0.5)  # and in another layer
    assert not torch.equal((other(z).q == z).flatten(1).all(1), (whole == z).flatten(1).all(1))


def test_skip_may_change_without_a_new_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, net = CompileCounterWithBackend("aot_eager"), Net(skip=0.5)
    net.vq.learn()
    step, x = torch.compile(net, fullgraph=True, backend=counter), torch.randn(200, 5, 8)
    outs = []
    for share in (0.5, 0.4, 0.3, 1.0):
        net.vq.skip = share
        outs.append(step(x).item())
    assert counter.frame_count == 1 and len(set(outs)) == 4


def test_skip_in_half_precision_and_after_the_meta_device():
    torch.manual_seed(0)
    z = torch.randn(400, 3, 6)
    share = lambda vq, z: (vq(z).q == z).flatten(1).all(1).float().mean()
    vq = VectorQuantizer(6, 16, skip=0.2).half()
    assert 0.1 < share(vq, z.half()) < 0.3
    with torch.device("meta"):
        vq = VectorQuantizer(6, 16, skip=0.2)
    vq.to_empty(device="cpu")
    vq.book.skip_now.fill_(-1)  # whatever lay in that memory
    vq.load_state_dict(VectorQuantizer(6, 16).state_dict())
    assert 0.1 < share(vq, z) < 0.3


@pytest.mark.parametrize("skip", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none(skip):
    with pytest.raises(ValueError, match="skip"):
        VectorQuantizer(4, 8, skip=skip)
    vq = VectorQuantizer(4, 8, skip=0.2)
    with pytest.raises(ValueError, match="skip"):
        vq.skip = skip
    assert vq.skip == 0.2 and vq.options() == {"estimator": vq.estimator_name, "skip": 0.2}
