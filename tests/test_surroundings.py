"""What surrounds a model: half precision by every road, weight averaging, activation checkpointing,
forward mode, older states."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from rotvq import VQVAE, VectorQuantizer
from test_quantizer import OPTIONS, layer, same, state_of

HALF = [torch.float16, torch.bfloat16]


# Half precision


def by_loader(model, dtype):
    """Every tensor cast and put into its place without asking the module, as loaders of large
    models do."""
    for module in model.modules():
        for held in (module._buffers, module._parameters):
            for name, value in held.items():
                if value is not None and value.is_floating_point():
                    cast = value.detach().to(dtype)
                    held[name] = nn.Parameter(cast) if held is module._parameters else cast
    return model.eval()  # which such loaders call


def by_assignment(model, dtype):
    model.load_state_dict(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()},
        assign=True,
    )
    return model


ROADS = {
    "to": lambda m, dtype: m.to(dtype),
    "half": lambda m, dtype: m.half() if dtype == torch.float16 else m.bfloat16(),
    "assign": by_assignment,
    "loader": by_loader,
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("options", [{}, {"learnable": True}, {"distance": "cosine"}], ids=str)
def test_a_model_in_half_precision(road, dtype, options):
    torch.manual_seed(0)
    model = ROADS[road](VQVAE(16, 8, 64, init="normal", **options), dtype)
    x = (torch.rand(2, 3, 16, 16) * 2 - 1).to(dtype)
    model.eval()
    out = model(x)
    assert (
        model.quantizer.decode(out.indices).dtype
        == model.decode(out.indices).dtype
        == out.x_hat.dtype
        == dtype
    )
    assert torch.equal(model.decode(model.encode(x)), out.x_hat)
    model.train()
    for _ in range(3):
        model(x).loss.backward()
    vq = model.quantizer
    assert vq.codebook.dtype == dtype and vq.counts.dtype == torch.float32
    if not vq.learnable:
        assert vq.sums.dtype == torch.float32 and vq.codebook.isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
def test_running_averages_are_not_rounded(dtype):
    "Neither by `.half()` nor on the way back; a count of 4e5 is beyond float16."
    vq = layer()
    vq.counts.fill_(4e5 + 1 / 3)
    vq.sums.copy_(vq.codebook * vq.counts[:, None])
    sums, counts = vq.sums.clone(), vq.counts.clone()
    for step in (
        lambda: vq.to(dtype),
        lambda: vq.float(),
        lambda: vq.to("cpu", dtype),
        lambda: vq.train(),
        lambda: copy.deepcopy(vq),
    ):
        step()
        assert torch.equal(vq.sums, sums) and torch.equal(vq.counts, counts)
    vq(torch.randn(50, 8).to(dtype))
    assert vq.codebook.isfinite().all() and vq.codebook.dtype == dtype
    assert layer().to(torch.float64).counts.dtype == torch.float64
    assert layer().half().to("meta").counts.dtype == torch.float32


def test_averages_that_a_loader_made_infinite_begin_at_the_codes():
    vq = layer()
    vq.counts[:5], vq.sums[7, 2] = 4e5, 1e6
    by_loader(vq, torch.float16)
    assert (
        vq.counts.dtype == torch.float32 and vq.counts.isfinite().all() and vq.sums.isfinite().all()
    )
    rows = [0, 1, 2, 3, 4, 7]
    assert (
        vq.counts[rows].eq(1).all()
        and torch.equal(vq.sums[rows], vq.codebook[rows].float())
        and not vq.sums.isnan().any()
    )
    vq.train()(torch.randn(50, 8).half())
    assert vq.codebook.isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", OPTIONS)
def test_made_under_another_default_dtype(options, dtype):
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        vq = VectorQuantizer(8, 32, **({"init": "normal"} | OPTIONS[options]))
        if vq.revive_after:
            vq.waited.fill_(5)
        out = vq(torch.randn(3000, 8))
        vq(torch.randn(3000, 8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (
        out.q.dtype == vq.codebook.dtype == dtype
        and vq.counts.dtype == torch.float32
        and vq.codebook.isfinite().all()
    )
    if options == "plain":
        assert vq.counts.sum() == pytest.approx(0.64 * 32 + 0.36 * 3000, rel=1e-5)


def test_autocast():
    torch.manual_seed(0)
    model = VQVAE(16, 8, 64, init="normal")
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        out = model.eval()(x)
        assert torch.equal(model.decode(model.encode(x)), out.x_hat)
        model.train()(x)
    assert {v.dtype for v in model.quantizer.state_dict().values() if v.is_floating_point()} == {
        torch.float32
    }


# Weight averaging


@pytest.mark.parametrize(
    "average",
    [
        {},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        {"avg_fn": lambda old, new, n: 0.9 * old + 0.1 * new},
    ],
    ids=["mean", "ema", "function"],
)
@pytest.mark.parametrize("options", OPTIONS)
def test_weights_are_averaged(average, options):
    vq = layer(**OPTIONS[options])
    averaged = AveragedModel(vq, use_buffers=True, **average)
    seen = []
    for k in range(4):
        vq(torch.randn(200, 8, generator=torch.Generator().manual_seed(k)))
        averaged.update_parameters(vq)
        seen.append(vq.codebook.detach().clone())
    expected = torch.stack(seen).mean(0)
    if average:
        expected = seen[0]
        for new in seen[1:]:
            expected = 0.9 * expected + 0.1 * new
    assert_close(averaged.module.codebook.detach(), expected)
    out = averaged.eval()(torch.randn(20, 8))
    assert out.q.isfinite().all() and averaged.module.ready == 1


def test_averaging_without_buffers_takes_the_latest_codebook():
    model = VQVAE(16, 8, 32)
    averaged, vq = AveragedModel(model), model.quantizer
    for _ in range(3):
        vq(torch.randn(200, 8))
        averaged.update_parameters(model)
    assert torch.equal(averaged.module.quantizer.codebook, vq.codebook)


# Activation checkpointing


class Checkpointed(nn.Module):
    "A layer in the checkpointed part, or outside it."

    def __init__(self, inside, use_reentrant=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.vq = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            VectorQuantizer(8, 32, **({"init": "normal"} | options)),
        )
        self.inside, self.reentrant = inside, use_reentrant

    def body(self, x):
        q, _, loss = self.vq(self.before(x))
        return self.after(q.relu()), loss

    def forward(self, x):
        if self.inside:
            y, loss = checkpoint(self.body, x, use_reentrant=self.reentrant)
        else:
            y, loss = self.body(x)
        return y.square().mean() + loss


def two_steps(net, call=None, told=False):
    grads = []
    for k in range(3):
        for p in net.parameters():
            p.grad = None
        (net if call is None else call)(
            torch.randn(60, 8, generator=torch.Generator().manual_seed(k)).requires_grad_()
        ).backward()
        if told:
            net.vq.learn()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    return grads, state_of(net)


@pytest.mark.parametrize("told", [False, True], ids=["automatic", "told"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_checkpointed_layer_is_right(options, reentrant, told):
    "Exactly one of the two passes teaches: counted once, revived once."
    if options == "k-means":
        reentrant = False  # whose first pass has no gradients, and is no start
    (a, state_a), (b, state_b) = (
        two_steps(Checkpointed(inside, reentrant, **OPTIONS[options]), told=told)
        for inside in (False, True)
    )
    assert_close(b, a)
    assert_close(state_b, state_a)
    assert state_a["vq.book.batches"] == (0 if options == "frozen" else 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_before_one_backward_pass(reentrant):
    """Told when to learn, the layer is right; by itself it moves before the second pass, and the
    kind that has looked up before refuses to."""
    x = torch.randn(2, 60, 8)

    def step(inside, told):
        net = Checkpointed(inside, reentrant)
        if told:
            net.vq.learn()
        leaf = x.clone().requires_grad_()
        (net(leaf[0]) + net(leaf[1])).backward()
        if told:
            net.vq.learn()
        return leaf.grad, net.vq.codebook.clone(), net.vq.batches

    for a, b in zip(step(True, True), step(False, True)):
        assert_close(a, b)
    if not reentrant:
        with pytest.raises(RuntimeError, match="learn_after"):
            step(True, False)


def test_a_mode_set_before_backward_moves_the_codes_of_an_automatic_layer_which_then_refuses():
    changes = (
        lambda net: net.eval(),
        lambda net: setattr(net.vq, "frozen", True),
        lambda net: net.vq.usage(),
    )
    for change in changes:
        net = Checkpointed(True)
        loss = net(torch.randn(60, 8).requires_grad_())
        change(net)
        with pytest.raises(RuntimeError, match="learn_after"):
            loss.backward()
    x, states = torch.randn(60, 8), []
    for inside in (False, True):  # told, it does not
        for change in changes:
            net = Checkpointed(inside)
            net.vq.learn()
            leaf = x.clone().requires_grad_()
            loss = net(leaf)
            change(net)
            loss.backward()
            states.append(leaf.grad)
    for grad in states[1:]:
        assert_close(grad, states[0])
    for inside in (False, True):  # nothing has moved here, and nothing may
        net = Checkpointed(inside).eval()
        before, leaf = state_of(net.vq), x.clone().requires_grad_()
        loss = net(leaf)
        net.train()
        loss.backward()
        assert same(before, state_of(net.vq))
        assert_close(leaf.grad, states[0])


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True], ids=["automatic", "told"])
@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "k-means"])
def test_a_checkpointed_layer_in_a_compiled_graph(options, told):
    "What is computed again is chosen by the default backend's partition; no code is generated."
    torch._dynamo.reset()
    net = Checkpointed(True, **OPTIONS[options])
    if told:
        net.vq.learn()
    compiled = torch.compile(net, backend="aot_eager_decomp_partition")
    grads, state = two_steps(net, compiled, told)
    expected, state_ = two_steps(Checkpointed(False, **OPTIONS[options]), told=told)
    assert_close(grads, expected, rtol=1e-4, atol=1e-6)
    assert_close(state, state_, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True], ids=["automatic", "told"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "k-means"])
def test_a_compiled_layer_in_a_checkpointed_part(options, reentrant, told):
    "The other way round: the compiled graph itself is run again in the backward pass."
    torch._dynamo.reset()
    net = Checkpointed(True, reentrant, **OPTIONS[options])
    if told:
        net.vq.learn()
    net.body = torch.compile(net.body, backend="aot_eager_decomp_partition")
    (grads, state), (expected, state_) = (
        two_steps(net, told=told),
        two_steps(Checkpointed(False, **OPTIONS[options]), told=told),
    )
    assert_close(grads, expected, rtol=1e-4, atol=1e-6)
    assert_close(state, state_, rtol=1e-4, atol=1e-6)


def test_a_pass_between_the_two_of_a_checkpoint_that_moves_the_codes_is_noticed():
    x = torch.randn(60, 8)
    for told in (False, True):
        net = Checkpointed(True)
        net(x).backward()
        if told:
            net.vq.learn()
        loss = net(x.clone().requires_grad_())
        with torch.no_grad():
            net.body(x)  # a discriminator's
        if told:
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="learn_after"):
                loss.backward()
            net(x).backward()  # and the next step is as ever


def test_a_second_backward_pass_through_a_checkpoint_is_right():
    for change in (
        lambda net: net.eval(),
        lambda net: setattr(net.vq, "frozen", True),
        lambda net: None,
    ):
        net = Checkpointed(True)
        change(net)
        leaf = torch.randn(60, 8).requires_grad_()
        loss = net(leaf)
        loss.backward(retain_graph=True)
        first = leaf.grad.clone()
        loss.backward()
        assert_close(leaf.grad, 2 * first)


def test_a_reentrant_checkpoint_inside_another_teaches_once():
    vq, linear = layer(), nn.Linear(8, 8)
    vq.learn()
    z = torch.randn(16, 8).requires_grad_()
    out = checkpoint(
        lambda x: checkpoint(linear, vq(x).q, use_reentrant=True), z, use_reentrant=False
    )
    out.sum().backward()
    assert vq.book.collected["sums"][:, -1].sum() == 16


# Transforms


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distance": "cosine"},
        {"learnable": True},
        {"estimator": "ste"},
        {"estimator": "reflection"},
        {"estimator": "rotation-until-used"},
        {"codebook_size": 300},
    ],
    ids=str,
)
def test_forward_mode_and_hessian_of_the_layer(options):
    torch.manual_seed(0)
    vq = (
        VectorQuantizer(**({"dim": 3, "codebook_size": 12, "init": "normal"} | options))
        .double()
        .eval()
    )
    z, t = torch.randn(2, 4, 3, dtype=torch.float64)

    def loss(z):
        out = vq(z)
        return out.q.sin().sum() + out.loss

    grad = torch.func.grad(loss)(z)
    assert_close(torch.func.jvp(loss, (z,), (t,))[1], (grad * t).sum())
    leaf = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    rows = torch.stack(
        [torch.autograd.grad(first.flatten()[k], leaf, retain_graph=True)[0] for k in range(12)]
    ).view(4, 3, 4, 3)
    assert_close(torch.func.hessian(loss)(z), rows)
    assert_close(torch.autograd.functional.hessian(loss, z), rows)


# Small things a user tries


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert layer(revive_after=np.int64(3)).revive_after == 3
    for bad in (np.float64(3), np.bool_(True), True, "3", 0):
        with pytest.raises(ValueError, match="revive_after"):
            layer(revive_after=bad)


def test_revival_goes_on_as_it_would_have_whatever_the_random_generator_does():
    """The draws are part of the state, so a run resumed from it, without random state, is the same
    run."""
    a = VectorQuantizer(8, 64, revive_after=2)
    for k in range(4):
        a(torch.randn(20, 8, generator=torch.Generator().manual_seed(k)))
    b = VectorQuantizer(8, 64, revive_after=2)
    b.load_state_dict(a.state_dict())
    for net, seed in ((a, 1), (b, 2)):
        torch.manual_seed(seed)
        for k in range(4, 8):
            net(torch.randn(20, 8, generator=torch.Generator().manual_seed(k)))
    assert same(state_of(a), state_of(b)) and a.batches == 8


def test_what_is_collected_stays_where_it_lies_and_is_fresh_after_the_meta_device():
    "A captured graph knows the addresses; a kernel counts its programs in `ticket`."
    vq = VectorQuantizer(4, 8, channel_first=False)
    vq.learn()
    vq(torch.randn(20, 4))
    before = {name: (t.data_ptr(), t.clone()) for name, t in vq.book.collected.items()}
    vq.to("cpu"), vq.to(torch.float32), vq.half(), vq.float()
    for name, t in vq.book.collected.items():
        assert t.data_ptr() == before[name][0] and torch.equal(t, before[name][1])
    vq.double()
    assert vq.book.collected["sums"].dtype == torch.float64
    with torch.device("meta"):
        empty = VectorQuantizer(4, 8, channel_first=False)
    empty.learn()
    empty(torch.randn(20, 4, device="meta"))
    empty.to_empty(device="cpu")
    assert not any(t.any() for t in empty.book.collected.values())
    empty.load_state_dict(vq.float().state_dict())
    vq.discard(), empty.discard()
    for net in (vq, empty):
        net(torch.ones(3, 4)), net.learn()
    assert torch.equal(vq.codebook, empty.codebook)
