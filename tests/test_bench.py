"""The bench for estimators: what it sees is what autograd says, and a trial can be repeated."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rotvq.run.bench import (
    TOY,
    Moment,
    alignment,
    cost,
    crops,
    gradient_at_z,
    length_only,
    trial,
    turn_only,
    watching,
)
from rotvq.run.model import VQVAE
from rotvq.run.training import to_float

SHORT = dataclasses.replace(TOY, epochs=1, batch=256)


@pytest.mark.parametrize("estimator", ["ste", "rotation", turn_only])
def test_a_moment_holds_the_gradient_at_q(estimator):
    torch.manual_seed(0)
    model, seen = VQVAE(8, 4, 16, 2, 1, estimator=estimator), []
    x = to_float(crops("val")[:4])
    with watching(model, seen.append):
        out = model(x)
        ((out.x_hat - x).square().mean() + out.loss).backward()
    moment = seen[0]
    assert moment.z.shape == moment.q.shape == moment.g.shape == (4 * 16, 4)
    q = moment.q.reshape(4, 4, 4, 4).movedim(-1, 1).clone().requires_grad_()
    (model.decoder(q) - x).square().mean().backward()
    assert_close(moment.g, q.grad.movedim(1, -1).reshape(-1, 4))
    # what reaches the encoder is the estimator's gradient and that of the commitment loss
    z = model.encoder(x)
    commitment = 2 * (moment.z - moment.q) / moment.z.numel()
    total = (gradient_at_z(estimator, moment) + commitment).reshape(4, 4, 4, 4).movedim(-1, 1)
    again = torch.autograd.grad(z, list(model.encoder.parameters()), total)
    for mine, parameter in zip(again, model.encoder.parameters()):
        assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-7)
    assert not model.quantizer._forward_hooks, "the hook stays"


def test_a_trial_can_be_repeated_and_trains_what_a_change_adds():
    def change(model):
        model.encoder = nn.Sequential(model.encoder, nn.Conv2d(16, 16, 1))

    a, b, c = trial("ste", SHORT), trial("ste", SHORT), trial("ste", SHORT, change=change)
    assert a.rows == b.rows != c.rows and a.rows[0]["epoch"] == 1
    torch.manual_seed(0)
    untrained = VQVAE(16, 16, 256, 2, 1)
    change(untrained)
    assert not torch.equal(c.model.encoder[1].weight, untrained.encoder[1].weight)


def test_alignment_of_straight_through_is_one_and_cost_is_positive():
    model, x = trial("ste", SHORT).model, to_float(crops("val")[:16])
    lies = alignment("ste", model, x)
    assert (
        lies.with_g == pytest.approx(1, abs=1e-5) and -1 <= lies.with_exact <= 1 and lies.change < 0
    )
    assert alignment("ste", model, x, step=0).change == 0
    assert cost("rotation", n=64, d=8, codebook_size=16, rounds=3) > 0


def test_a_gradient_of_degenerate_vectors_is_finite():
    zero = torch.zeros(3, 4)
    for estimator in ("rotation", turn_only, length_only):
        assert gradient_at_z(estimator, Moment(zero, zero, torch.ones(3, 4))).isfinite().all()
