"""Compiled by the default backend, with something after the layer, training equals eager training:
gradients, state, and what is returned."""

import copy
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from rotvq import VQVAE, VectorQuantizer, learn_after
from rotvq.layer.quantizer import ESTIMATORS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("c++") is None and shutil.which("g++") is None,
        reason="torch.compile needs a C++ compiler on a CPU",
    ),
]


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x.relu())
        return x


class ChannelsLast(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv():
    return nn.Conv2d(8, 8, 3, padding=1)


FOLLOWERS = {
    "relu conv": lambda: nn.Sequential(nn.ReLU(), conv()),
    "layernorm linear": lambda: ChannelsLast(nn.LayerNorm(8), nn.Linear(8, 8)),
    "groupnorm conv": lambda: nn.Sequential(nn.GroupNorm(2, 8), conv()),
    "batchnorm conv": lambda: nn.Sequential(nn.BatchNorm2d(8), conv()),
    "upsample conv": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv()),
    "residual stack": Stack,
}
OPTIONS = {name: {"estimator": name} for name in ESTIMATORS} | {
    "learnable": {"learnable": True},
    "cosine": {"distance": "cosine"},
    "revival": {"revive_after": 1},
    "k-means": {"init": "kmeans"},
    "learnable cosine revival": {"learnable": True, "distance": "cosine", "revive_after": 2},
    "many codes": {"codebook_size": 300},
    "frozen": {"frozen": True},
}


class Model(nn.Module):
    """Returns the loss alone, so that a compiler is free to compute `q` again in the backward pass,
    or with `returns` what else there is."""

    def __init__(self, after="relu conv", returns=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.returns = returns
        self.before, self.after = nn.Conv2d(8, 8, 1), FOLLOWERS[after]()
        self.vq = VectorQuantizer(
            **({"dim": 8, "codebook_size": 32, "init": "normal", "channel_first": True} | options)
        )

    def forward(self, x, mask=None):
        z = self.before(x)
        q, indices, commitment = self.vq(z, mask)
        y = self.after(q)
        loss = y.square().mean() + (y * y.detach().sin()).mean() + commitment
        return (loss, q, indices, y) if self.returns else (loss,)


def pictures(step, batch=3, size=(5, 6)):
    return torch.randn(batch, 8, *size, generator=torch.Generator().manual_seed(step))


def train(model, call, batches, mask=None, told=False):
    """SGD; for each step what it returned, and all gradients. What was returned must be the same
    after `backward()`."""
    opt, seen = torch.optim.SGD(model.parameters(), 0.05), []
    if told:
        learn_after(model, opt)
    for x in batches:
        opt.zero_grad()
        x = x.clone().requires_grad_()
        returned = call(x) if mask is None else call(x, mask)
        before = [t.detach().clone() for t in returned]
        returned[0].backward()
        assert all(torch.equal(a, b) for a, b in zip(before, returned)), (
            "what the step returned has changed in backward()"
        )
        seen.append(
            before + [x.grad] + [p.grad.clone() for p in model.parameters() if p.grad is not None]
        )
        opt.step()
    return seen


def assert_same_training(
    model, backend="inductor", batches=tuple(map(pictures, range(4))), mask=None, **how
):
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    told = how.get("fullgraph", False)  # by itself the layer leaves the graph to learn
    eager, compiled = (
        train(model, model, batches, mask, told),
        train(twin, torch.compile(twin, backend=backend, **how), batches, mask, told),
    )
    for step, (a, b) in enumerate(zip(eager, compiled)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_close(y, x, rtol=2e-4, atol=2e-6, msg=lambda m: f"step {step}: {m}")
    assert_close(twin.state_dict(), model.state_dict(), rtol=2e-4, atol=2e-6)


# the other followers: in other modes, and in the step that is compiled with its optimizer
@pytest.mark.parametrize(
    "after, returns",
    [(after, False) for after in FOLLOWERS if after not in ("layernorm linear", "groupnorm conv")]
    + [("relu conv", True), ("residual stack", True)],
)
def test_whatever_follows_the_layer(after, returns):
    assert_same_training(Model(after, returns))


# the rotation is in all other tests, learnable and cosine in the combination
ELSEWHERE = "rotation", "learnable", "cosine", "frozen"


@pytest.mark.parametrize("options", [name for name in OPTIONS if name not in ELSEWHERE])
def test_every_option(options):
    model = Model(**OPTIONS[options])
    if options == "k-means":
        model.vq.kmeans_init(model.before(pictures(9, 8)))
    assert_same_training(model, fullgraph=True)


def test_masks():
    mask = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.7
    assert_same_training(Model(), mask=mask, fullgraph=True)


# each option before two followers, and each follower behind the rotation
PAIRS = dict.fromkeys(
    [(after, "rotation") for after in FOLLOWERS]
    + [("relu conv", options) for options in OPTIONS]
    + list(zip(list(FOLLOWERS)[1:] * len(OPTIONS), OPTIONS))
)


@pytest.mark.parametrize("after, options", PAIRS)
def test_pairs_with_the_partition_of_the_default_backend(after, options):
    """Without generating code: this is where a lookup was moved behind
    the update of the codes."""
    model = Model(after, **OPTIONS[options])
    if options == "k-means":
        model.vq.kmeans_init(model.before(pictures(9, 8)))
    assert_same_training(model, backend="aot_eager_decomp_partition", fullgraph=True)


def test_a_kmeans_start_breaks_the_graph_once_and_says_so_where_that_is_forbidden():
    torch.manual_seed(5)
    model = Model(init="kmeans")
    torch.manual_seed(6)
    eager = copy.deepcopy(model)
    train(eager, eager, [pictures(0)])
    torch.manual_seed(6)
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    train(twin, torch.compile(twin), [pictures(0)])
    assert twin.vq.ready and twin.vq.usage() > 0.5
    assert_close(twin.state_dict(), eager.state_dict(), rtol=2e-4, atol=2e-6)
    torch._dynamo.reset()
    model.vq.learn()
    with pytest.raises(Exception, match="call_kmeans_init_or_learn_after_to_stay"):
        torch.compile(model, fullgraph=True)(pictures(0))


def test_an_automatic_layer_leaves_the_graph_and_names_the_line_that_keeps_it_there():
    assert_same_training(Model(revive_after=1))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="call_learn_after_to_stay"):
        torch.compile(Model(), fullgraph=True)(pictures(0))
    assert torch.compile(Model().eval(), fullgraph=True)(pictures(0))[0].isfinite()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "rotation-until-used"},
        {"estimator": "rotation-until-used", "revive_after": 1},
    ],
    ids=str,
)
def test_codes_may_be_read_before_backward_in_an_automatic_layer(options):
    "What is pending is learned then; the compiled graph has codes, and a weight, of its own."
    torch._dynamo.reset()
    model, grads = Model(**options), []
    for net in (model, copy.deepcopy(model)):
        call = net if net is model else torch.compile(net)
        x = pictures(0).requires_grad_()
        (loss,) = call(x)
        net.vq.usage(), net.vq.codebook.sum()
        loss.backward()
        grads.append(x.grad)
    assert_close(*grads, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("shape", ["(B, N, d)", "(B, d, H, W)"])
@pytest.mark.parametrize("training", [True, False])
def test_what_the_layer_returns_is_not_overwritten(shape, training):
    torch._dynamo.reset()
    x = {
        "(B, N, d)": torch.randn(4, 16, 8),
        "(B, d, H, W)": torch.randn(2, 8, 4, 6),
    }[shape].requires_grad_()
    layer = VectorQuantizer(8, 32, init="normal").train(training)

    def step(z):
        q, indices, loss = layer(z)
        return q, indices, q.relu().sum() + loss

    q, indices, loss = torch.compile(step)(x)
    held = q.detach().clone(), indices.clone(), loss.detach().clone()
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(held, (q, indices, loss)))
    torch.nn.functional.relu(q.detach(), inplace=True)  # and it is the caller's, who may change it


def test_two_frames_serve_all_batch_sizes():
    torch._dynamo.reset()
    for options in (
        {},
        {"learnable": True, "distance": "cosine", "estimator": "reflection"},
        {"revive_after": 2, "estimator": "rotation-until-used", "skip": 0.3},
    ):
        counter = CompileCounterWithBackend("aot_eager_decomp_partition")
        model = Model(**options)
        assert_same_training(
            model,
            backend=counter,
            batches=[pictures(k, batch) for k, batch in enumerate((3, 3, 5, 2, 7, 3, 4, 6, 8, 9))],
            fullgraph=True,
        )
        assert counter.frame_count <= 2, (options, counter.frame_count)


def test_the_whole_step_compiled_with_its_optimizer():
    torch._dynamo.reset()
    results = []
    for compile in (lambda f: f, torch.compile):
        model = Model("groupnorm conv")
        opt = torch.optim.AdamW(model.parameters(), 1e-2)

        @compile
        def step(x):
            opt.zero_grad()
            (loss,) = model(x)
            loss.backward()
            opt.step()
            return loss.detach()

        results.append([step(pictures(k)) for k in range(4)] + [model.state_dict()])
    assert_close(results[1], results[0], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_other_modes(mode):
    assert_same_training(Model("layernorm linear"), mode=mode)


def test_the_model_of_the_run():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = VQVAE(16, 8, 32, init="normal")
    twin = copy.deepcopy(model)
    for net in (model, twin):
        net.quantizer.learn()
    compiled = torch.compile(twin, fullgraph=True)
    for step in range(3):
        x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
        for net, call in ((model, model), (twin, compiled)):
            net.zero_grad()
            out = call(x)
            ((out.x_hat - x).square().mean() + out.loss).backward()
            net.quantizer.learn()
        for a, b in zip(model.parameters(), twin.parameters()):
            assert_close(b.grad, a.grad, rtol=2e-4, atol=1e-6)


def test_half_precision_by_autocast():
    torch._dynamo.reset()
    model = Model("layernorm linear")
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin)
    grads = []
    for net, call in ((model, model), (twin, compiled)):
        with torch.autocast("cpu", torch.bfloat16):
            (loss,) = call(pictures(0))
        loss.backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads):
        assert ((a - b).norm() / a.norm()) < 0.05  # bfloat16 is rounded in other places


def test_no_warning_of_lambda_inside_a_graph():
    """It would have to wait for a value there; eager mode warns at the tenth batch, and `diagnose`
    can be asked at any time."""
    torch._dynamo.reset()
    layer = VectorQuantizer(8, 32, learnable=True)
    layer.codebook.data.mul_(1e-3)
    layer.learn()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(12):
            compiled(torch.randn(64, 8))
    assert layer.diagnose(torch.randn(64, 8)).lam.median() < 0.01
    with pytest.warns(UserWarning, match="median of λ"):
        for _ in range(12):
            layer(torch.randn(64, 8))


@pytest.mark.parametrize(
    "name, backend", [*((name, "aot_eager") for name in ESTIMATORS), ("rotation", "inductor")]
)
def test_transforms_inside_a_compiled_function(name, backend):
    """PyTorch would trace the forward pass of a custom autograd function alone, and return zeros:
    the estimators break the graph."""
    z, q = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    vq = VectorQuantizer(4, 16, estimator=name, init="normal").eval()
    grad = torch.func.grad(lambda z: ESTIMATORS[name](z, q).sin().sum())
    single = torch.func.grad(lambda z: ESTIMATORS[name](z, q[0]).sin().sum())
    through_layer = torch.func.grad(lambda z: vq(z).q.sin().sum() + vq(z).loss)
    for transformed in (
        lambda z: grad(z),
        lambda z: torch.func.vmap(single)(z),
        lambda z: through_layer(z),
    ):
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the graph breaks
            assert_close(torch.compile(transformed, backend=backend)(z), transformed(z))
