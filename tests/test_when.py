"""What the chapter on rivals changes in a model, and its runs."""

import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close

from helpers import ROOT
from rotvq.layer.gradients import straight_through
from rotvq.layer.relatives import SimVQ
from rotvq.run.bench import TOY, crops, trial
from rotvq.run.model import VQVAE
from rotvq.run.training import Learner, to_float
from rotvq.run.when import FSQ, learnable, normalized, quantized_by
from rotvq.run.why import cloud_of, half_placed

pytestmark = pytest.mark.slow


def test_learnable_keeps_the_other_options():
    "All of them: a run with skip was one without, once."
    options = dict(
        distance="cosine",
        commitment=0.5,
        revive_after=7,
        estimator="reflection",
        init="normal",
        skip=0.2,
        decay=0.9,
        codebook_weight=2.0,
        initial_count=0,
    )
    model = VQVAE(8, 4, 16, 2, 1, **options)
    before = model.quantizer.options(every=True)
    learnable(model)
    vq = model.quantizer
    assert vq.options(every=True) == before | {"learnable": True} and isinstance(
        vq.codebook, torch.nn.Parameter
    )
    out = model(torch.rand(2, 3, 16, 16))
    (out.x_hat.square().mean() + out.loss).backward()
    assert vq.codebook.grad.abs().sum() > 0
    plain = VQVAE(8, 4, 16, 2, 1, estimator=straight_through)
    learnable(plain)
    assert plain.quantizer.estimator is straight_through


@pytest.mark.parametrize(
    "change",
    [
        learnable,
        quantized_by(lambda vq: FSQ(vq.dim, (4, 4, 4))),
        quantized_by(lambda vq: SimVQ(vq.dim, vq.codebook_size, estimator=vq.estimator)),
    ],
)
def test_each_trains_and_all_of_it_learns(change):
    config = dataclasses.replace(TOY, epochs=1, batch=256, codebook_size=64)
    learner = Learner(config, "rotation", 0, torch.device("cpu"), change)
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    learner.begin(0)
    for _ in range(20):
        learner.step(to_float(crops()[:64]))  # at first all of FSQ's numbers may round to zero
    assert all(not torch.equal(p, before[name]) for name, p in learner.model.named_parameters())
    assert trial("rotation", config, change=change).rows[0]["mse"] < 1


def test_normalized_holds_the_scale_of_z():
    torch.manual_seed(0)
    model = VQVAE(16, 8, 32, 2, 1)
    normalized(model)
    x = to_float(crops("val")[:8])
    z = model.encoder(x)
    assert_close(z.flatten(1).mean(1), torch.zeros(8), atol=1e-5, rtol=0)
    assert_close(z.flatten(1).var(1, unbiased=False), torch.ones(8), atol=1e-2, rtol=0)
    assert sum(isinstance(part, torch.nn.GroupNorm) for part in model.modules()) == 3
    learner = Learner(
        dataclasses.replace(TOY, epochs=1),
        "rotation-until-used",
        0,
        torch.device("cpu"),
        normalized,
    )
    assert learner.step(x)[0].isfinite()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_half_of_the_codes_are_placed_once(distance):
    torch.manual_seed(0)
    model = VQVAE(16, 8, 32, 2, 1, distance=distance)
    start = model.quantizer.codebook.clone()
    half_placed(model)
    x = to_float(crops("val")[:64])
    with torch.no_grad():
        z = model.encoder(x)
    model.quantizer(z)
    placed = model.quantizer.codebook  # and one step of the running average
    assert not torch.equal(placed[:16], start[:16]) and (model.quantizer.idle[:16] == 0).sum() > 8
    far = torch.cdist(
        placed[:16].double(),
        z.movedim(1, -1).flatten(0, 2).double()
        if distance == "euclidean"
        else torch.nn.functional.normalize(z.movedim(1, -1).flatten(0, 2).double(), dim=1),
    ).amin(1)
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
    assert_close(
        torch.tensor(cloud.error), torch.tensor(cloud.mse) / rows.var(0, unbiased=False).mean()
    )
    assert abs(cloud.error / cloud.floor - 1) < 0.1


def test_no_recorded_run_is_another_one_under_a_false_name():
    "A setting that was lost on the way gives the curves of the run without it, to the last digit."
    rows = [
        json.loads(line)
        for line in (ROOT / "nbs" / "results" / "when.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    curves: dict = {}
    for row in rows:
        curves.setdefault(tuple(row["mse"]), []).append(
            (row["setup"], row["estimator"], row["lr"], row["seed"])
        )
    assert not [runs for runs in curves.values() if len(runs) > 1]
