"""Codebooks without running averages: a learnable one, SimVQ and FSQ."""
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rotvq.bench import TOY, crops, trial
from rotvq.codebook import nearest_code
from rotvq.model import VQVAE
from rotvq.training import Learner, to_float
from rotvq.when import FSQ, SimVQ, learnable, quantized_by

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
    model = VQVAE(8, 4, 16, 2, 1, distance="cosine", commitment=0.5, revive_after=7, estimator="reflection", init="normal")
    learnable(model)
    vq = model.quantizer
    assert vq.learnable and isinstance(vq.codebook, torch.nn.Parameter)
    assert (vq.distance, vq.commitment, vq.revive_after, vq.estimator, vq.init) == ("cosine", 0.5, 7, "reflection", "normal")
    out = model(torch.rand(2, 3, 16, 16))
    (out.x_hat.square().mean() + out.loss).backward()
    assert vq.codebook.grad.abs().sum() > 0


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
