"""The public API as users write it, for a type checker; nothing here runs. `tests/test_types.py`
checks it."""

from pathlib import Path
from typing import Literal, assert_type

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import rotvq
from rotvq import (
    VQVAE,
    Quantized,
    VectorQuantizer,
    convert_state_dict,
    householder_matrix,
    learn_after,
    linear_estimator,
    nearest_code,
    reflect,
    reflection_trick,
    rotate,
    rotation_matrix,
    rotation_trick,
    straight_through,
)


def estimators(z: Tensor, q: Tensor) -> None:
    assert_type(straight_through(z, q), Tensor)
    assert_type(rotation_trick(z, q, gamma=1.0, dim=1), Tensor)
    assert_type(reflection_trick(z, q, torch.ones(3)), Tensor)
    assert_type(linear_estimator(z, q, torch.eye(3)), Tensor)
    assert_type(householder_matrix(z), Tensor)
    assert_type(reflect(z, q), Tensor)
    assert_type(rotate(z, z, q), Tensor)
    assert_type(rotation_matrix(z, q), Tensor)
    assert_type(nearest_code(z, q, distance="cosine"), Tensor)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vq = VectorQuantizer(
            dim=8, codebook_size=16, estimator=lambda z, q: q, revive_below=0.5, channel_first=True
        )

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        q, indices, loss = self.vq(z, mask)
        assert_type(q, Tensor)
        assert_type(indices, Tensor)
        return q + loss


def layer(z: Tensor) -> None:
    vq = Model().vq
    assert_type(vq, VectorQuantizer)
    assert_type(vq(z), Quantized)
    assert_type(vq(z).q, Tensor)
    assert_type(vq.encode(z), Tensor)
    assert_type(vq.decode(vq.encode(z)), Tensor)
    assert_type(vq.codebook, Tensor)
    assert_type(vq.counts, Tensor)
    assert_type(vq.idle, Tensor)
    assert_type(vq.batches, Tensor)
    assert_type(vq.frozen, bool)
    assert_type(vq.decay, float)
    assert_type(vq.revive_after, int | Literal["auto"] | None)
    assert_type(vq.usage(), Tensor)
    assert_type(vq.perplexity(), Tensor)
    assert_type(vq.diagnose(z).theta, Tensor)
    assert_type(vq.train(), VectorQuantizer)
    vq.frozen, vq.decay, vq.revive_after, vq.commitment = True, 0.9, None, 0.25
    vq.kmeans_init([z, z], steps=3)
    vq.learn()
    vq.discard()


def training(model: VQVAE, x: Tensor) -> None:
    opt = torch.optim.AdamW(model.parameters())
    assert_type(learn_after(model, opt, scaler=torch.amp.GradScaler("cpu")), RemovableHandle)
    assert_type(model(x).x_hat, Tensor)
    assert_type(model.encode(x), Tensor)
    assert_type(model.decode(model.encode(x)), Tensor)
    assert_type(model.quantizer, VectorQuantizer)
    model.save_pretrained(Path("model"), run={"seed": 0})
    assert_type(VQVAE.from_pretrained("model", estimator="ste"), VQVAE)
    assert_type(convert_state_dict(model.state_dict(), prefix="vq."), dict[str, Tensor])
    assert_type(rotvq.__version__, str)


class Own(VQVAE):
    pass


assert_type(Own.from_pretrained("model"), Own)
