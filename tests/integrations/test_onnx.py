"""ONNX of encode, decode and the whole model in eval mode, run by onnxruntime: any batch and size,
identical indices."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import Dim

from rotvq import VectorQuantizer
from test_export import WAYS, Part, example, model

B, H, W = Dim("B", min=1, max=64), Dim("H", min=1, max=64), Dim("W", min=1, max=64)


def session(net, x, dynamic, file):
    torch.onnx.export(net.eval(), (x,), file, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def run(made, x):
    return made.run(None, {made.get_inputs()[0].name: x.numpy()})


def assert_agree(theirs, ours):
    for a, b in zip(theirs, ours if isinstance(ours, tuple) else (ours,)):
        if b.dtype == torch.int64:
            assert np.array_equal(a, b.numpy())
        else:
            np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options", [{}, {"distance": "cosine"}, {"estimator": "ste"}, {"learnable": True}], ids=str
)
def test_model(way, options, tmp_path):
    net, (shape, dynamic) = Part(model(**options), way), WAYS[way]
    made = session(net, example(way, *shape), dynamic, tmp_path / "model.onnx")
    for size in ((2, 4, 6), (5, 3, 7), (1, 8, 2)):
        x = example(way, *(size if way == "decode" else (size[0], 3, 4 * size[1], 4 * size[2])))
        assert_agree(run(made, x), net(x))


def test_the_indices_of_many_vectors_are_identical(tmp_path):
    torch.manual_seed(0)
    layer = VectorQuantizer(32, 1024, init="normal", channel_first=False).eval()
    made = session(
        Part(layer, "encode"), torch.randn(2, 10, 32), {0: B, 1: H}, tmp_path / "layer.onnx"
    )
    z = torch.randn(64, 64, 32)
    (found,) = run(made, z)
    assert np.array_equal(found, layer.encode(z).numpy())


def test_far_from_the_origin(tmp_path):
    net = model()
    net.quantizer.codebook += 1000
    made = session(
        Part(net.quantizer, "encode"),
        torch.randn(2, 8, 4, 6),
        {0: B, 2: H, 3: W},
        tmp_path / "layer.onnx",
    )
    z = torch.randn(3, 8, 5, 5) + 1000
    assert np.array_equal(run(made, z)[0], net.quantizer.encode(z).numpy())
