"""A pytest plugin: the own tests of vector_quantize_pytorch with `rotvq.VectorQuantizer` in the place of its `VectorQuantize`.

    make test-peer

Tests of its other classes are left out; a test that asks for an option which VectorQuantizer does not have is skipped, and names it.
"""
import inspect
from importlib.util import find_spec

import pytest
import torch
import vector_quantize_pytorch
from torch import nn

from rotvq import VectorQuantizer

NAMES = {"dim": "dim", "codebook_size": "codebook_size", "commitment_weight": "commitment", "threshold_ema_dead_code": "revive_below",
         "learnable_codebook": "learnable"}
WITHOUT_EFFECT = {"ema_update", "accept_image_fmap", "channel_last", "kmeans_iters"}   # said in another way


class Adapter(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.last, first = options.get("channel_last", True), options.pop("accept_image_fmap", False) or not options.pop("channel_last", True)
        ours = {NAMES[name]: options.pop(name) for name in list(options) if name in NAMES}
        ours["estimator"] = "rotation" if options.pop("rotation_trick", True) else "ste"
        ours["distance"] = "cosine" if options.pop("use_cosine_sim", False) else "euclidean"
        ours["init"] = "kmeans" if options.pop("kmeans_init", False) else "normal"
        decay = options.pop("decay", 0.8)
        ours |= {"frozen": True} if decay == 1 else {"decay": decay}       # theirs: the codes stay
        if not ours.get("revive_below", 1): del ours["revive_below"]
        for name in WITHOUT_EFFECT: options.pop(name, None)
        if options: pytest.skip(f"VectorQuantizer has no {', '.join(options)}")
        self.vq = VectorQuantizer(channel_first=first, **ours)

    def forward(self, x, mask=None, lens=None, freeze_codebook=False, **more):
        if more: pytest.skip(f"VectorQuantizer has no {', '.join(more)}")
        if lens is not None: mask = torch.arange(x.shape[1]) < lens[:, None]
        frozen, self.vq.frozen = self.vq.frozen, self.vq.frozen or freeze_codebook
        try: return self.vq(x, mask)
        finally: self.vq.frozen = frozen

    def get_codes_from_indices(self, indices): return self.vq.decode(indices)

    get_output_from_indices = get_codes_from_indices


vector_quantize_pytorch.VectorQuantize = Adapter


def pytest_collection_modifyitems(config, items):
    def applies(item) -> bool:
        source = inspect.getsource(item.function)
        return "import VectorQuantize\n" in source and ("x_transformers" not in source or find_spec("x_transformers") is not None)

    config.hook.pytest_deselected(items=[item for item in items if not applies(item)])
    items[:] = [item for item in items if applies(item)]
