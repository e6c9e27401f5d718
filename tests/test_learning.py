"""When codes move: by themselves at the next training forward pass, or when the optimizer does; and
what belongs to neither."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from rotvq import VQVAE, VectorQuantizer, convert_state_dict, learn_after
from rotvq.householder import unit
from rotvq.layer.lookup import code_sums, ema_update, nearest_code
from test_quantizer import OPTIONS, layer, same, state_of


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.vq, self.after = nn.Linear(8, 8), layer(**options), nn.Linear(8, 8)

    def forward(self, x):
        q, _, loss = self.vq(self.before(x))
        return self.after(q).square().mean() + loss


def batch(step, n=60):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(step))


def trained(net, opt=None, steps=6, told=True, parts=1):
    "Steps with SGD, each on a batch in some parts; the state."
    opt = opt or torch.optim.SGD(net.parameters(), 0.1)
    if told:
        learn_after(net, opt)
    torch.manual_seed(0)  # a k-means start draws
    for step in range(steps):
        opt.zero_grad()
        for part in batch(step).chunk(parts):
            (net(part) / parts).backward()
        opt.step()
    return state_of(net)


# Both modes


@pytest.mark.parametrize("options", OPTIONS)
def test_both_modes_and_learning_by_hand_are_the_same_training(options):
    automatic, told, by_hand = (Net(**OPTIONS[options]) for _ in range(3))
    by_hand.vq.learn()
    opt = torch.optim.SGD(by_hand.parameters(), 0.1)
    torch.manual_seed(0)
    for step in range(6):
        opt.zero_grad(), by_hand(batch(step)).backward(), opt.step(), by_hand.vq.learn()
    state = trained(told)
    assert same(trained(automatic, told=False), state) and same(state_of(by_hand), state)
    assert automatic.vq.automatic and not told.vq.automatic and not by_hand.vq.automatic


@pytest.mark.parametrize(
    "options", [name for name in OPTIONS if "revival" not in name and name != "k-means"]
)
def test_parts_of_a_batch_teach_as_the_whole(options):
    """Gradients add up over micro-batches, and so does what the codes learn from. (Codes are
    revived on the latest part.)"""
    whole, parts = Net(**OPTIONS[options]), Net(**OPTIONS[options])
    a, b = trained(whole), trained(parts, parts=4)
    assert_close(b, a, rtol=1e-4, atol=1e-5)
    assert a["vq.book.batches"] == (0 if options == "frozen" else 6)
    by_itself = Net(**OPTIONS[options])
    trained(by_itself, told=False, parts=4)
    assert by_itself.vq.batches == 4 * a["vq.book.batches"]


READINGS = {
    "eval": lambda net: net.eval(),
    "codebook": lambda net: net.vq.codebook,
    "counts": lambda net: net.vq.counts,
    "idle": lambda net: net.vq.idle,
    "encode": lambda net: net.vq.encode(batch(9)),
    "decode": lambda net: net.vq.decode(torch.tensor([0])),
    "usage": lambda net: net.vq.usage(),
    "perplexity": lambda net: net.vq.perplexity(),
    "diagnose": lambda net: net.vq.diagnose(batch(9)),
    "state_dict": lambda net: net.state_dict(),
    "buffers": lambda net: list(net.buffers()),
    "parameters": lambda net: list(net.parameters()),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "averaged": lambda net: AveragedModel(net, use_buffers=True),
    "double": lambda net: net.double().float(),
    "decay": lambda net: setattr(net.vq, "decay", 0.3),
    "frozen": lambda net: setattr(net.vq, "frozen", True),
    "a pass without gradients": lambda net: torch.no_grad()(net)(batch(9)),
}


@pytest.mark.parametrize("reading", READINGS)
def test_what_is_pending_is_learned_before_it_is_read(reading):
    "By itself the layer learns at its next training pass, and nobody who looks can tell."
    net, expected = Net(), Net()
    net(batch(0)), expected(batch(0))
    before = net.vq.book.codes.clone()
    expected.vq.learn()  # by hand, at once
    assert net.vq.book.batches == 0 and torch.equal(net.vq.book.codes, before)
    READINGS[reading](net)
    assert net.vq.book.batches == 1 and torch.equal(net.vq.book.codes, expected.vq.book.codes)
    told = Net()
    told.vq.learn(), told(batch(0)), READINGS[reading](told)
    assert told.vq.book.batches == 0 and torch.equal(
        told.vq.book.codes, before
    )  # and told when to learn it waits for that


def test_copies_begin_in_the_automatic_mode_and_with_the_attributes():
    net = Net()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    learn_after(net, opt)
    net.vq.decay, net.vq.commitment, net.vq.estimator, net.vq.revive_after = 0.5, 0.3, "ste", 9
    net(batch(0)).backward()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.vq.automatic and (
            twin.vq.decay,
            twin.vq.commitment,
            twin.vq.estimator,
            twin.vq.revive_after,
        ) == (0.5, 0.3, "ste", 9)
        twin(batch(1))
        assert twin.vq.batches == 1  # nothing was pending in it
    opt.step()
    assert net.vq.batches == 1


def test_the_first_call_by_hand_learns_what_is_pending():
    vq = layer()
    vq(batch(0)), vq.learn()
    assert vq.batches == 1
    vq(batch(1)), vq(batch(2))
    assert vq.batches == 1
    vq.learn()
    assert vq.batches == 2
    vq.learn()
    assert vq.batches == 2  # of nothing
    vq.automatic = True
    vq(batch(3))
    assert vq.batches == 3


def test_a_loaded_state_has_nothing_pending():
    vq, other = layer(), layer(decay=0.5)
    vq(batch(0))
    vq.load_state_dict(state_of(other))
    assert same(state_of(vq), state_of(other))


# What teaches


def test_a_pass_without_gradients_teaches_nothing_unless_asked():
    for context in (torch.no_grad, torch.inference_mode):
        vq, before = layer(), state_of(layer())
        with context():
            vq(batch(0))
        assert same(state_of(vq), before)
        vq.collect_without_grad = True  # k-means by forward passes
        with torch.no_grad():
            for _ in range(5):
                loss = vq(batch(0)).loss
        assert vq.batches == 5 and loss < layer()(batch(0)).loss


def gan(passes, told=True):
    "Three steps of a generator whose discriminator sees its pictures first; the codebook."
    net, critic = Net(), nn.Linear(8, 1)
    opt, opt_d = torch.optim.SGD(net.parameters(), 0.1), torch.optim.SGD(critic.parameters(), 0.1)
    if told:
        learn_after(net, opt)
    with torch.no_grad():
        critic.weight.fill_(0.1)
    for step in range(3):
        x = batch(step)
        q = passes(net, x)
        opt_d.zero_grad(), critic(q).mean().backward(), opt_d.step()
        opt.zero_grad()
        q, _, loss = net.vq(net.before(x))
        (-critic(q).mean() + loss).backward()
        opt.step()
    return net.vq.codebook.clone(), net.vq.batches


def test_a_discriminator_does_not_teach():
    def without_graph(net, x):
        with torch.no_grad():
            return net.vq(net.before(x)).q

    def with_graph(net, x):
        q = net.vq(net.before(x)).q
        net.vq.discard()  # the documented line
        return q.detach()

    codes, batches = gan(without_graph)
    assert batches == 3
    assert torch.equal(gan(with_graph)[0], codes) and torch.equal(
        gan(without_graph, told=False)[0], codes
    )
    assert (
        gan(lambda net, x: net.vq(net.before(x)).q.detach())[1] == 3
    )  # in the same step both passes teach
    assert not torch.equal(gan(lambda net, x: net.vq(net.before(x)).q.detach())[0], codes)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_skipped_by_the_codes_too(fused):
    net, expected = Net(), Net()
    opt = torch.optim.SGD(net.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    learn_after(net, opt, scaler=None if fused else scaler)  # a fused optimizer tells by itself
    for step in range(4):
        opt.zero_grad()
        loss = net(batch(step))
        scaler.scale(loss * (torch.inf if step == 1 else 1)).backward()
        scaler.step(opt), scaler.update(1.0)
    plain = torch.optim.SGD(expected.parameters(), 0.1)
    learn_after(expected, plain)
    for step in (0, 2, 3):
        plain.zero_grad(), expected(batch(step)).backward(), plain.step()
    assert net.vq.batches == 3
    assert_close(state_of(net), state_of(expected))


def test_after_remove_a_scaler_discards_nothing():
    net = Net()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    learn_after(net, opt, scaler).remove()
    scaler.scale(net(batch(0))).backward(), scaler.step(opt), scaler.update()
    net.vq.learn()
    assert net.vq.batches == 1
    with pytest.raises(TypeError, match="no torch.optim.Optimizer"):
        learn_after(net, object())


def test_a_part_with_nan_revives_nothing():
    vq = layer(revive_below=2.0)
    vq.learn(), vq(batch(0))
    before = state_of(vq)
    vq(torch.full((4, 8), torch.nan)), vq.learn()
    assert same(state_of(vq), before)


def test_attributes_are_checked_when_they_are_set_and_modes_lose_nothing():
    vq = layer()
    for name, value in (("decay", 1.5), ("revive_after", 0), ("initial_count", 3)):
        before = getattr(vq, name)
        with pytest.raises(ValueError):
            setattr(vq, name, value)
        assert getattr(vq, name) == before
    for name in ("distance", "codebook_size", "dim", "learnable", "init"):
        with pytest.raises(AttributeError, match="another layer"):
            setattr(vq, name, getattr(vq, name))
    vq.learn(), vq(batch(0))
    vq.automatic = True
    assert vq.batches == 1
    vq.learn(), vq.double()
    assert vq.book.collected["sums"].dtype == torch.float64
    vq.half()
    assert (
        vq.book.collected["sums"].dtype == vq.counts.dtype == torch.float64
    )  # what adds up is not rounded


@pytest.mark.slow
def test_a_state_or_a_start_may_come_after_learn_after_in_a_whole_graph():
    for init in ("normal", "kmeans"):
        torch._dynamo.reset()
        net = Net(init=init)
        learn_after(net, torch.optim.SGD(net.parameters(), 0.1))
        if init == "kmeans":
            net.vq.kmeans_init(batch(3, 200))
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        compiled(batch(0)).backward()
        net.load_state_dict(net.state_dict())
        compiled(batch(0)).backward()


def test_codes_that_are_frozen_before_the_step_stay():
    net = Net()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    learn_after(net, opt)
    before = state_of(net.vq)
    net(batch(0)).backward()
    net.vq.frozen = True
    opt.step()
    assert same(state_of(net.vq), before)
    net.vq.frozen = False
    opt.step()
    assert same(state_of(net.vq), before)  # nothing was kept for later


def test_after_an_exception_the_batch_teaches_unless_it_is_discarded():
    "As its gradients do, unless they are set to zero."
    states = []
    for discard in (False, True):
        net, expected = Net(), Net()
        opt = torch.optim.SGD(net.parameters(), 0.1)
        learn_after(net, opt)
        try:
            net(batch(0)), 1 / 0
        except ZeroDivisionError:
            opt.zero_grad(), discard and net.vq.discard()
        net(batch(1)).backward(), opt.step()
        expected.vq.learn()
        if not discard:
            expected(batch(0))
        expected(batch(1)), expected.vq.learn()
        assert_close(net.vq.codebook, expected.vq.codebook), states.append(net.vq.codebook)
    assert not torch.equal(*states)


def test_an_optimizer_that_calls_a_closure_learns_once_a_step():
    net = Net()
    opt = torch.optim.LBFGS(net.parameters(), max_iter=3)
    learn_after(net, opt)

    def closure():
        opt.zero_grad()
        loss = net(batch(0))
        loss.backward()
        return loss

    for _ in range(2):
        opt.step(closure)
    assert net.vq.batches == 2 and net.vq.counts.sum() > 32


def test_learn_after_finds_every_codebook_and_can_be_taken_back():
    net = nn.ModuleList([Net(), Net(learnable=True), nn.Linear(3, 3)])
    opt = torch.optim.Adam(net.parameters())
    handle = learn_after(net, opt)
    sum(part(batch(0)) for part in net[:2]).backward()
    opt.step()
    assert [part.vq.batches for part in net[:2]] == [1, 1]
    handle.remove()
    sum(part(batch(0)) for part in net[:2]).backward()
    opt.step()
    assert [part.vq.batches for part in net[:2]] == [1, 1]
    with pytest.raises(ValueError, match="Linear has no codebook"):
        learn_after(net[2], opt)


# Revival


@pytest.mark.parametrize("options", [{}, {"learnable": True}, {"distance": "cosine"}], ids=str)
def test_revival_by_vectors_and_not_by_batches(options):
    "400 vectors for each of 8 codes are 50 batches of 64, or 25 of 128."
    for batch, after in ((64, 50), (128, 25)):
        layers = []
        for revive_after in ("auto", after):
            torch.manual_seed(0)
            layers.append(
                VectorQuantizer(4, 8, init="normal", revive_after=revive_after, **options)
            )
        assert layers[0].revive_after == "auto" and "revive_after=auto" in repr(layers[0])
        placed = 0
        for step in range(120):
            z = torch.randn(batch, 4, generator=torch.Generator().manual_seed(step)) * 0.1 + 3
            for vq in layers:
                vq(z), vq.learn()
            assert all(
                torch.equal(a, b) for a, b in zip(*(vq.state_dict().values() for vq in layers))
            )
            placed += (layers[0].waited == 0).sum() - (layers[0].idle == 0).sum()
        assert placed > 0
    for bad in ("later", 0, -1, 2.5, True):
        with pytest.raises(ValueError, match="auto"):
            VectorQuantizer(4, 8, revive_after=bad)


@pytest.mark.parametrize(
    "how",
    [{"revive_after": 3}, {"revive_below": 0.5}, {"revive_after": 3, "revive_below": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"learnable": True}, {"distance": "cosine"}], ids=str)
def test_unused_codes_are_put_on_vectors_of_the_batch_before(how, options):
    vq = layer(**how, **options)
    vq.learn()
    near = vq.codebook.detach()[:4].clone()
    for step in range(6):
        z = near.repeat(16, 1) + 0.01 * batch(step, 64)
        vq(z)
        before = vq.codebook.detach().clone()
        vq.learn()
        moved = (vq.codebook.detach() != before).any(1)
        revived = vq.waited.eq(0) & vq.idle.gt(0)
        if "revive_after" in how and step < 2 and "revive_below" not in how:
            assert not revived.any()
        if revived.any():
            break
    else:
        pytest.fail("no code was revived")
    on = unit(z) if vq.distance == "cosine" else z
    assert (vq.codebook.detach()[revived, None] == on).all(-1).any(1).all()
    assert vq.counts[revived].eq(max(1, how.get("revive_below", 0))).all() and moved[revived].all()
    assert len(vq.codebook.detach()[revived].unique(dim=0)) == revived.sum()


def test_a_running_count_is_revived_as_theirs_is():
    "vector_quantize_pytorch puts codes below its threshold on vectors, and gives them that count."
    from vector_quantize_pytorch import VectorQuantize

    theirs, ours = VectorQuantize(8, 32, threshold_ema_dead_code=2), layer(revive_below=2)
    (
        theirs._codebook.embed.copy_(ours.codebook),
        theirs._codebook.embed_avg.copy_(ours.codebook),
        theirs._codebook.cluster_size.fill_(1),
    )
    z = batch(0, 40)
    dead = (0.8 + 0.2 * nearest_code(z, ours.codebook).bincount(minlength=32)) < 2
    theirs(z[None]), ours(z)
    for codes, counts in (
        (ours.codebook, ours.counts),
        (theirs._codebook.embed[0], theirs._codebook.cluster_size[0]),
    ):
        assert (
            torch.equal(counts == 2, dead)
            and (codes[dead, None] - z).abs().amax(-1).amin(1).max() < 1e-4
        )


def test_revival_may_be_turned_on_later_in_a_whole_graph_too():
    torch._dynamo.reset()
    vq = layer()
    vq.learn()
    vq.revive_after = 1
    step = torch.compile(vq, fullgraph=True, backend="aot_eager")
    for k in range(3):
        step(batch(k, 8)), vq.learn()
    assert vq.waited.eq(0).all()


# Counts at the start, and codes that fade


def test_counts_may_begin_at_zero_as_in_the_authors_code():
    from vector_quantize_pytorch import VectorQuantize

    torch.manual_seed(0)
    theirs, ours = VectorQuantize(8, 32), layer(initial_count=0)
    (
        theirs._codebook.embed.copy_(ours.codebook),
        theirs._codebook.embed_avg.copy_(ours.codebook),
        theirs._codebook.cluster_size.zero_(),
    )
    for step in range(20):
        z = batch(step, 100)
        assert torch.equal(ours(z).indices, theirs(z[None])[1][0])
        chosen = ours.counts > 1e-3
        assert_close(ours.codebook[chosen], theirs._codebook.embed[0][chosen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_codes_that_nobody_chooses_do_not_fade_into_denormal_numbers(distance, decay):
    vq = layer(distance=distance, decay=decay)
    near = vq.codebook[:4].clone()
    for _ in range(400):
        vq(near)
    assert len(vq.encode(near).unique()) == 4
    for state in (vq.codebook, vq.sums, vq.counts):
        assert (state.eq(0) | (state.abs() > 1e-30)).all()
    if distance == "cosine":
        assert_close(vq.codebook.norm(dim=1), torch.ones(32))
    vq(vq.codebook[9:10].repeat(50, 1)), vq(batch(1))
    assert vq.codebook.isfinite().all()


def test_half_precision_is_never_given_what_it_cannot_hold():
    vq = layer(revive_after=1).half()
    vq.waited.fill_(5)
    for _ in range(3):
        vq(1e5 * batch(0))
    assert (
        vq.codebook.isfinite().all() and vq.codebook.abs().max() == torch.finfo(torch.float16).max
    )


# The lookup


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_code_that_is_not_finite_is_never_chosen(distance, value):
    codes, z = batch(0, 16), batch(1, 500)
    right = nearest_code(z, codes, distance=distance)
    spoilt = codes.clone()
    spoilt[3, 5] = value
    found = nearest_code(z, spoilt, distance=distance)
    assert (found != 3).all() and torch.equal(found[right != 3], right[right != 3])
    assert nearest_code(z, torch.full_like(codes, value), distance=distance).eq(0).all()


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
@pytest.mark.parametrize("far", [10.0, 1e3, 1e5])
def test_groups_that_lie_far_apart_are_told_apart_inside_too(groups, far):
    """No single origin serves them: by products alone, up to half of the vectors get a code that is
    not the nearest."""
    places = far * batch(7, groups)
    codes, z = (places.repeat_interleave(n, 0) + 0.1 * batch(n, n * groups) for n in (64, 200))
    found = nearest_code(z, codes)
    exact = torch.cdist(z.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert (exact.gather(1, found[:, None])[:, 0] <= exact.amin(1) * (1 + 1e-3) + far * 1e-7).all()
    assert (
        found != exact.argmin(1)
    ).float().mean() < 0.01 + far * 1e-6  # the input itself is rounded at 1e5


def test_sums_of_many_vectors():
    assert code_sums(torch.full((2**20, 1), 0.1), torch.zeros(2**20, dtype=torch.int64), 1)[
        0, 0
    ].item() == pytest.approx(2**20 * 0.1, rel=1e-6)


def test_a_step_of_the_average_forgets_nothing_of_a_batch_it_cannot_use():
    state = batch(0, 4), torch.ones(4), batch(0, 4)
    before = [x.clone() for x in state]
    for bad in (torch.zeros(4, 9), torch.full((4, 9), torch.nan)):
        ema_update(*state, bad)
    assert all(torch.equal(a, b) for a, b in zip(state, before))


# The loss


@pytest.mark.parametrize(
    "options", [{}, {"learnable": True, "codebook_weight": 0.3}, {"distance": "cosine"}], ids=str
)
def test_a_loss_for_each_sample_or_token(options):
    z, mask = (
        torch.randn(5, 7, 8),
        torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.6,
    )
    mask[3] = False
    for m in (None, mask):
        mean, sample, token = (
            layer(**options, reduction=r).eval()(z, m).loss for r in ("mean", "sample", "none")
        )
        real = torch.ones(5, 7) if m is None else m.float()
        assert token.shape == (5, 7) and sample.shape == (5,) and mean.shape == ()
        assert_close(mean, (token * real).sum() / real.sum())
        assert_close(sample, (token * real).sum(1) / real.sum(1).clamp_min(1))
        assert (token * (1 - real)).abs().sum() == 0
    assert (
        layer(reduction="none")(torch.randn(2, 8, 3, 4)).loss.shape == (2, 3, 4)
        and layer(reduction="sample")(torch.randn(8)).loss.shape == ()
    )


def test_the_weight_of_the_codebook_loss():
    z = torch.randn(50, 8)
    grads = []
    for weight in (1.0, 0.25):
        vq = layer(learnable=True, codebook_weight=weight, commitment=0.0)
        vq(z).loss.backward()
        grads.append(vq.codebook.grad)
    assert_close(grads[1], 0.25 * grads[0])


# Starts and states


def test_a_layer_made_on_the_meta_device_begins_with_reset_parameters():
    with torch.device("meta"):
        vq = VectorQuantizer(8, 16, init="kmeans")
    vq = vq.to_empty(device="cpu")
    for state in vq.buffers():
        state.fill_(10**6)
    for module in vq.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert (
        not vq.ready and vq.batches == 0 and vq.counts.eq(1).all() and vq.codebook.abs().max() < 1
    )
    vq(batch(0, 200))
    assert vq.ready and vq.usage() > 0.9
    for options in OPTIONS.values():  # what the constructor makes
        a = layer(**options)
        state = state_of(a)
        torch.manual_seed(0)
        a.book.reset_parameters()
        assert same(state_of(a), state)


def test_a_kmeans_start_says_what_it_lacks():
    with pytest.warns(UserWarning, match="random"):
        VectorQuantizer(4, 16, init="kmeans").eval()(torch.randn(10, 4))
    with pytest.warns(UserWarning, match="random"):
        VectorQuantizer(4, 16, init="kmeans").eval().encode(torch.randn(10, 4))
    with pytest.warns(UserWarning, match="1200 vectors, of which 3 differ"):
        VectorQuantizer(4, 16, init="kmeans")(torch.eye(4)[:3].repeat(400, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vq = VectorQuantizer(4, 16, init="kmeans")
        vq(torch.randn(300, 4)), vq.eval()(torch.randn(10, 4))
        other = VectorQuantizer(4, 16, init="kmeans").eval()
        other.load_state_dict(vq.state_dict())
        other(torch.randn(10, 4))


def test_bad_options_and_inputs_of_the_newer_kind():
    for bad, word in (
        ({"revive_below": 0}, "revive_below = 0"),
        ({"revive_below": float("nan")}, "nan"),
        ({"initial_count": 0.5}, "initial_count = 0.5"),
        ({"reduction": "sum"}, "reduction is 'sum'"),
        ({"codebook_weight": -1}, "codebook_weight = -1"),
        ({"decay": 1}, "frozen=True"),
    ):
        with pytest.raises(ValueError, match=word):
            layer(**bad)
    with pytest.raises(TypeError, match="ndarray"):
        layer()(torch.zeros(2, 8).numpy())
    with pytest.raises(TypeError, match="ndarray"):
        layer().decode(torch.zeros(2).numpy())
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(lambda z: layer()(z).loss)(torch.zeros(3, 8))


def as_in_0_0_3(state):
    return {
        name.replace("book.codes", "codebook").replace("book.", ""): value
        for name, value in state.items()
    }


def test_a_model_saved_by_0_0_3_loads(tmp_path):
    from safetensors.torch import load_file, save_file

    from rotvq.run.model import upgrade_state_dict

    torch.manual_seed(0)
    for options in ({}, {"learnable": True}):
        model = VQVAE(16, 8, 32, **options)
        model(torch.rand(2, 3, 16, 16))
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        assert "quantizer.waited" in as_in_0_0_3(weights) and not any(
            "book." in name for name in as_in_0_0_3(weights)
        )
        save_file(as_in_0_0_3(weights), tmp_path / "model.safetensors")
        assert same(state_of(VQVAE.from_pretrained(tmp_path)), state_of(model))
    assert upgrade_state_dict({"codebook": 1, "a.codebook": 2}) == {
        "codebook": 1,
        "a.codebook": 2,
    }  # of somebody else


def test_attributes_are_saved_with_the_model(tmp_path):
    model = VQVAE(8, 4, 16, decay=0.9, init="kmeans")
    vq = model.quantizer
    vq.kmeans_init(torch.randn(100, 4))
    vq.frozen, vq.decay, vq.commitment, vq.revive_after, vq.estimator = True, 0.8, 0.25, 50, "ste"
    model.save_pretrained(tmp_path)
    again = VQVAE.from_pretrained(tmp_path)
    for name, value in vq.options(every=True).items():
        assert getattr(again.quantizer, name) == value, name
    before = state_of(again.quantizer)
    again.train()(torch.rand(2, 3, 16, 16))
    assert same(state_of(again.quantizer), before)
    again.save_pretrained(tmp_path)
    assert VQVAE.from_pretrained(tmp_path).quantizer.frozen


def test_a_converted_state_has_all_entries():
    from vector_quantize_pytorch import VectorQuantize

    state = convert_state_dict(VectorQuantize(8, 32).state_dict())
    assert state.keys() == layer().state_dict().keys()
