"""The layer: layouts, learning, independence of mode and copies, compilation, bad input."""
import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from rotvq import Quantized, VectorQuantizer, rotation_trick
from rotvq.quantizer import ESTIMATORS

from test_estimators import explicit


def layer(**kw):
    torch.manual_seed(0)
    return VectorQuantizer(8, 32, init="normal", **kw)


def test_returns_unpack_and_value_is_a_code():
    q, indices, loss = out = layer()(torch.randn(5, 7, 8))
    assert isinstance(out, Quantized) and q.shape == (5, 7, 8) and indices.shape == (5, 7) and loss.shape == ()


def test_estimators_share_the_value_and_differ_in_the_gradient():
    torch.manual_seed(1)
    z, g = torch.randn(50, 8), torch.randn(50, 8)
    grads = {}
    for name in ESTIMATORS:
        vq, leaf = layer(estimator=name).eval(), z.clone().requires_grad_()
        q, indices, _ = vq(leaf)
        assert torch.equal(q, vq.codebook[indices])
        grads[name] = torch.autograd.grad(q, leaf, g)[0]
        assert_close(grads[name].double(), explicit(name, z, q.detach(), g), rtol=1e-4, atol=1e-5)
    assert all((grads[a] - grads[b]).abs().median() > 0.1 for a, b in (("ste", "rotation"), ("ste", "reflection"), ("rotation", "reflection")))


def test_a_function_of_your_own_is_the_estimator():
    z = torch.randn(5, 8, requires_grad=True)
    vq = layer(estimator=lambda z, q: 3 * z + (q - 3 * z).detach())
    assert torch.autograd.grad(vq(z).q.sum(), z)[0].eq(3).all() and vq.estimator_name == "custom:<lambda>"
    assert layer(estimator=rotation_trick).estimator_name == "rotation"


def test_layouts_agree():
    vq, x = layer(), torch.randn(2, 8, 3, 5)
    results = [copy.deepcopy(vq)(x), copy.deepcopy(vq)(x.permute(0, 2, 3, 1)), copy.deepcopy(vq)(x.to(memory_format=torch.channels_last))]
    assert torch.equal(results[0].q, results[2].q) and torch.equal(results[0].q.permute(0, 2, 3, 1), results[1].q)
    assert all(torch.equal(r.indices, results[0].indices) for r in results)
    with pytest.raises(ValueError, match="channel_first"): vq(torch.randn(2, 8, 3, 8))
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
    assert not any(torch.equal(v, start[k]) for k, v in vq.state_dict().items())


def test_same_after_copy_pickle_and_state_dict():
    vq, z = layer(), torch.randn(100, 8)
    vq(z)
    other = VectorQuantizer(8, 32)
    other.load_state_dict(vq.state_dict())
    for twin in (copy.deepcopy(vq), pickle.loads(pickle.dumps(vq)), other):
        a, b = copy.deepcopy(vq)(z), twin(z)
        assert torch.equal(a.q, b.q) and torch.equal(a.indices, b.indices) and torch.equal(a.loss, b.loss)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiles_whole_and_runs_on_meta(mode, estimator):
    vq, x = layer(estimator=estimator), torch.randn(2, 8, 4, 4)
    getattr(vq, mode)()
    twin = copy.deepcopy(vq)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for net, leaf in ((vq, a), (compiled, b)):
        out = net(leaf)
        (out.q.square().sum() + out.loss).backward()
    assert_close(a.grad, b.grad)
    assert_close(vq.codebook, twin.codebook)
    on_meta = layer(estimator=estimator).to("meta")
    getattr(on_meta, mode)()
    assert on_meta(x.to("meta")).q.shape == x.shape


def test_autocast_and_half_inputs_keep_the_codebook_in_float32():
    vq, x = layer(), torch.randn(4, 10, 8)
    with torch.autocast("cpu", torch.bfloat16): out = vq(x.bfloat16())
    assert out.q.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert all(v.dtype == torch.float32 for v in vq.state_dict().values())


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


@pytest.mark.parametrize("kw, word", [(dict(dim=0), "dim = 0"), (dict(codebook_size=0), "codebook_size = 0"), (dict(decay=1.0), "decay = 1.0"),
    (dict(decay=-0.1), "decay"), (dict(commitment=-1), "commitment"), (dict(estimator="nope"), "nope"), (dict(init="zeros"), "zeros")])
def test_bad_settings_are_refused(kw, word):
    with pytest.raises(ValueError, match=word): VectorQuantizer(**(dict(dim=4, codebook_size=8) | kw))


def test_bad_input_is_refused():
    vq = layer()
    with pytest.raises(ValueError, match=r"\(2, 9\).*dim = 8"): vq(torch.zeros(2, 9))
    with pytest.raises(TypeError, match="int64"): vq(torch.zeros(2, 8, dtype=torch.int64))
    for bad in (torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(TypeError, match="integers"): vq.decode(bad)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_decode_takes_any_integers(dtype):
    vq = layer()
    assert torch.equal(vq.decode(torch.tensor([[1, 3]], dtype=dtype)), vq.codebook[[1, 3]][None])


@pytest.mark.parametrize("estimator", ["ste", "rotation", "reflection"])
def test_a_decoder_may_begin_in_place(estimator):
    layer = VectorQuantizer(4, 16, estimator=estimator)
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.nn.functional.relu(layer(z).q, inplace=True).sum().backward()
    assert z.grad.isfinite().all()
