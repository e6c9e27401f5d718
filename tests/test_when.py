"""Codebooks without running averages: a learnable one, SimVQ and FSQ."""
import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rotvq.bench import TOY, crops, trial
from rotvq.codebook import nearest_code
from rotvq.model import VQVAE
from rotvq.ste import straight_through
from rotvq.training import Learner, to_float
from rotvq.when import FSQ, SimVQ, learnable, normalized, quantized_by
from rotvq.why import cloud_of, half_placed

ROOT = Path(__file__).resolve().parent.parent
levels = st.lists(st.integers(2, 9), min_size=1, max_size=4)


@given(levels)
def test_fsq_has_each_level_and_each_index_once(levels):
    fsq = FSQ(6, levels)
    values = [torch.arange(L) - L // 2 for L in levels]
    # far out, each number lands on its first or last level; between, on all of them
    for column, expected in enumerate(values):
        y = torch.zeros(2001, len(levels))
        y[:, column] = torch.linspace(-9, 9, 2001)
        assert fsq.grid(y)[:, column].unique().tolist() == expected.tolist()
    assert torch.equal(fsq.grid(torch.full((1, len(levels)), torch.inf))[0], torch.stack([v[-1] for v in values]).float())
    # the index counts the grid
    steps = torch.tensor(levels).cumprod(0) // torch.tensor(levels)
    grid = torch.tensor(list(itertools.product(*(v.tolist() for v in values))))
    indices = ((grid + torch.tensor(levels) // 2) * steps).sum(1)
    assert indices.sort().values.tolist() == list(range(fsq.codebook_size))


def test_fsq_indices_say_what_is_decoded():
    torch.manual_seed(0)
    fsq, z = FSQ(6, (5, 4)), 3 * torch.randn(2, 6, 8, 8)
    q, indices, loss = fsq(z)
    assert q.shape == z.shape and indices.shape == (2, 8, 8) and loss == 0
    for index in indices.unique():
        same = q.movedim(1, -1)[indices == index]
        assert_close(same, same[:1].expand_as(same))


@pytest.mark.parametrize("levels", [(), (8, 1), (0,)])
def test_fsq_says_which_levels_it_cannot_have(levels):
    with pytest.raises(ValueError, match="levels"): FSQ(4, levels)


@pytest.mark.parametrize("autocast", [False, True])
def test_simvq_moves_its_map_and_no_code(autocast):
    torch.manual_seed(0)
    vq, z = SimVQ(6, 32, "rotation", 0.25), torch.randn(2, 6, 5, 5, requires_grad=True)
    frozen = vq.frozen.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast): q, indices, loss = vq(z)
    codes = frozen @ vq.map.weight.T
    rows = z.movedim(1, -1)
    assert torch.equal(indices, nearest_code(rows, codes.detach()))
    assert_close(q.movedim(1, -1), codes[indices], rtol=1e-6, atol=1e-6)
    assert_close(loss, 1.25 * (rows - codes[indices]).square().mean())
    (loss + q.sum()).backward()
    assert vq.map.weight.grad.abs().sum() > 0 and z.grad.abs().sum() > 0
    assert dict(vq.named_parameters()).keys() == {"map.weight"}


def test_learnable_keeps_the_other_options():
    "All of them: a run with skip was one without, once."
    options = dict(distance="cosine", commitment=0.5, revive_after=7, estimator="reflection", init="normal", skip=0.2, decay=0.9, codebook_weight=2.0, initial_count=0)
    model = VQVAE(8, 4, 16, 2, 1, **options)
    before = model.quantizer.options(every=True)
    learnable(model)
    vq = model.quantizer
    assert vq.options(every=True) == before | {"learnable": True} and isinstance(vq.codebook, torch.nn.Parameter)
    out = model(torch.rand(2, 3, 16, 16))
    (out.x_hat.square().mean() + out.loss).backward()
    assert vq.codebook.grad.abs().sum() > 0
    plain = VQVAE(8, 4, 16, 2, 1, estimator=straight_through)
    learnable(plain)
    assert plain.quantizer.estimator is straight_through


@pytest.mark.parametrize("change", [learnable, quantized_by(lambda vq: FSQ(vq.dim, (4, 4, 4))),
                                    quantized_by(lambda vq: SimVQ(vq.dim, vq.codebook_size, vq.estimator))])
def test_each_trains_and_all_of_it_learns(change):
    config = dataclasses.replace(TOY, epochs=1, batch=256, codebook_size=64)
    learner = Learner(config, "rotation", 0, torch.device("cpu"), change)
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    learner.begin(0)
    for _ in range(20): learner.step(to_float(crops()[:64]))  # at first all of FSQ's numbers may round to zero
    assert all(not torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
    assert trial("rotation", config, change=change).rows[0]["mse"] < 1


def test_simvq_counts_for_the_rule():
    torch.manual_seed(0)
    vq, z, g = SimVQ(6, 32, "rotation-until-used"), torch.randn(2, 6, 5, 5, requires_grad=True), torch.randn(2, 6, 5, 5)
    grads = {}
    for name in ("rotation", "rotation-until-used", "ste"):
        vq.estimator = name
        grads[name], = torch.autograd.grad(vq(z).q, z, g)
        if name == "rotation": vq.idle.fill_(2**40)
    assert_close(grads["rotation-until-used"], grads["rotation"])          # no code has been chosen before
    for _ in range(200): indices = vq(z).indices                           # 160 K vectors, 50 at a time, take 103 batches
    assert (vq.idle == 0).sum() == len(indices.unique()) and (vq.idle > 103).sum() == 32 - len(indices.unique())
    vq.estimator = "rotation-until-used"
    # the codes of a linear map are about equally long: none is within reach, and the rule goes straight
    assert torch.equal(torch.autograd.grad(vq(z).q, z, g)[0], grads["ste"])


def test_normalized_holds_the_scale_of_z():
    torch.manual_seed(0)
    model = VQVAE(16, 8, 32, 2, 1)
    normalized(model)
    x = to_float(crops("val")[:8])
    z = model.encoder(x)
    assert_close(z.flatten(1).mean(1), torch.zeros(8), atol=1e-5, rtol=0)
    assert_close(z.flatten(1).var(1, unbiased=False), torch.ones(8), atol=1e-2, rtol=0)
    assert sum(isinstance(part, torch.nn.GroupNorm) for part in model.modules()) == 3
    learner = Learner(dataclasses.replace(TOY, epochs=1), "rotation-until-used", 0, torch.device("cpu"), normalized)
    assert learner.step(x)[0].isfinite()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_half_of_the_codes_are_placed_once(distance):
    torch.manual_seed(0)
    model = VQVAE(16, 8, 32, 2, 1, distance=distance)
    start = model.quantizer.codebook.clone()
    half_placed(model)
    x = to_float(crops("val")[:64])
    with torch.no_grad(): z = model.encoder(x)
    model.quantizer(z)
    placed = model.quantizer.codebook                                     # and one step of the running average
    assert not torch.equal(placed[:16], start[:16]) and (model.quantizer.idle[:16] == 0).sum() > 8
    far = torch.cdist(placed[:16].double(), z.movedim(1, -1).flatten(0, 2).double() if distance == "euclidean"
                      else torch.nn.functional.normalize(z.movedim(1, -1).flatten(0, 2).double(), dim=1)).amin(1)
    assert far.max() < 0.1
    before = model.quantizer.codebook.clone()
    model.quantizer.eval()(z)
    assert torch.equal(model.quantizer.codebook, before)


def test_a_cloud_is_measured_as_it_is():
    "A model whose encoder and decoder do nothing: the error of the lookup is that of the pictures."
    torch.manual_seed(0)
    model = VQVAE(8, 3, 64, 2, 1)
    model.encoder = model.decoder = torch.nn.Identity()
    x = torch.randn(16, 3, 8, 8) * torch.tensor([1.0, 1.0, 0.01])[:, None, None]
    model.quantizer.kmeans_init(x)
    cloud = cloud_of(model, x)
    rows = x.movedim(1, -1).flatten(0, 2)
    assert cloud.decoded == 0 and abs(cloud.dimensions - 2) < 0.1
    assert_close(torch.tensor(cloud.error), torch.tensor(cloud.mse) / rows.var(0, unbiased=False).mean())
    assert abs(cloud.error / cloud.floor - 1) < 0.1


def test_no_recorded_run_is_another_one_under_a_false_name():
    "A setting that was lost on the way gives the curves of the run without it, to the last digit."
    rows = [json.loads(line) for line in (ROOT / "nbs" / "results" / "when.jsonl").read_text(encoding="utf-8").splitlines()]
    curves: dict = {}
    for row in rows: curves.setdefault(tuple(row["mse"]), []).append((row["setup"], row["estimator"], row["lr"], row["seed"]))
    assert not [runs for runs in curves.values() if len(runs) > 1]
