"""A pytest plugin: the own tests of vector_quantize_pytorch with layers of `rotvq` in the place of
its `VectorQuantize`, `ResidualVQ`, `FSQ` and `SimVQ`.

    make test-peer

Tests of its other classes are left out; a test that asks for an option which ours do not have is
skipped, and names it.
"""

import inspect
import re
from importlib.util import find_spec

import pytest
import torch
import vector_quantize_pytorch
from torch import nn

from rotvq import FSQ, ProductVQ, ResidualVQ, SimVQ, VectorQuantizer

NAMES = {
    "commitment_weight": "commitment",
    "threshold_ema_dead_code": "revive_below",
    "learnable_codebook": "learnable",
    "quantize_dropout": "quantizer_dropout",
}
WITHOUT_EFFECT = {
    "ema_update",
    "accept_image_fmap",
    "accept_3d_fmap",
    "channel_last",
    "kmeans_iters",
}  # said in another way


def translated(options: dict, same: set) -> dict:
    "Their options as ours; skips the test where there is one that ours do not have."
    first = (
        options.pop("accept_image_fmap", False)
        or options.pop("accept_3d_fmap", False)
        or not options.pop("channel_last", True)
    )
    ours = {name: options.pop(name) for name in list(options) if name in same}
    ours |= {NAMES[name]: options.pop(name) for name in list(options) if name in NAMES}
    ours["estimator"] = "rotation" if options.pop("rotation_trick", True) else "ste"
    ours["distance"] = "cosine" if options.pop("use_cosine_sim", False) else "euclidean"
    ours["init"] = "kmeans" if options.pop("kmeans_init", False) else "normal"
    decay = options.pop("decay", 0.8)
    ours |= {"frozen": True} if decay == 1 else {"decay": decay}  # theirs: the codes stay
    if not ours.get("revive_below", 1):
        del ours["revive_below"]
    for name in list(options):
        if name in WITHOUT_EFFECT or not options[name]:
            del options[name]  # off
    if options:
        pytest.skip(f"there is no {', '.join(options)}")
    return {"channel_first": first} | ours


class Adapter(nn.Module):
    def __init__(self, **options):
        super().__init__()
        own = options.pop("separate_codebook_per_head", False)
        kind = ProductVQ if own else VectorQuantizer
        self.vq = kind(**translated(options, {"dim", "codebook_size", "codebook_dim", "heads"}))

    def forward(self, x, mask=None, lens=None, freeze_codebook=False, **more):
        if more:
            pytest.skip(f"there is no {', '.join(more)}")
        more = (
            {}
            if mask is None and lens is None
            else {"mask": torch.arange(x.shape[1]) < lens[:, None] if mask is None else mask}
        )
        layers = [part for part in self.vq.modules() if isinstance(part, VectorQuantizer)]
        held = [layer.frozen for layer in layers]
        for layer in layers:
            layer.frozen = layer.frozen or freeze_codebook
        try:
            return self.vq(x, **more)
        finally:
            for layer, frozen in zip(layers, held):
                layer.frozen = frozen

    @property
    def codebook(self):
        return self.vq.codebook

    def get_codes_from_indices(self, indices):
        return self.vq.decode(indices)

    get_output_from_indices = get_codes_from_indices


class Stack(Adapter):
    def __init__(self, **options):
        nn.Module.__init__(self)
        self.vq = ResidualVQ(
            **translated(
                options,
                {"dim", "codebook_size", "codebook_dim", "num_quantizers", "shared_codebook"},
            )
        )
        if self.vq.shared_codebook:
            self.vq.learn()  # moves when told to


class Rounded(nn.Module):
    def __init__(self, levels, **options):
        super().__init__()
        if not options.get("return_indices", True):
            pytest.skip("indices are always there")
        options = {name: value for name, value in options.items() if value}
        if options.keys() - {"dim"}:
            pytest.skip(f"there is no {', '.join(options)}")
        self.vq = FSQ(levels, channel_first=False, **options)

    def forward(self, x):
        return self.vq(x)[:2]

    def indices_to_codes(self, indices):
        return self.vq.decode(indices)


OURS = {"VectorQuantize": Adapter, "ResidualVQ": Stack, "FSQ": Rounded, "SimVQ": SimVQ}
for name, adapter in OURS.items():
    setattr(vector_quantize_pytorch, name, adapter)


def pytest_collection_modifyitems(config, items):
    def applies(item) -> bool:
        source = inspect.getsource(item.function)
        asked = {
            name
            for line in re.findall(r"from vector_quantize_pytorch import (.*)", source)
            for name in re.split(r"[,\s]+", line)
        }
        return (
            bool(asked)
            and asked <= OURS.keys()
            and ("x_transformers" not in source or find_spec("x_transformers") is not None)
        )

    config.hook.pytest_deselected(items=[item for item in items if not applies(item)])
    items[:] = [item for item in items if applies(item)]
