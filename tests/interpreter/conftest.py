"""Triton's interpreter in the place of a GPU: the kernels become the forms that compute on a CPU."""
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"                                      # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))             # the helpers of the other tests

import numpy as np
import pytest
import torch
from hypothesis import settings

from rotvq import kernels
from rotvq.codebook import best_code, best_code_definition
from rotvq.rotation import pullback

settings.register_profile("interpreter", deadline=None, max_examples=10, derandomize=True)


def fma(builder, x, y, z):
    "A GPU rounds x · y + z once; the interpreter would round the product before. Float64 holds every product of float32."
    from triton.runtime.interpreter import TensorHandle
    wide = np.float64 if x.data.dtype == np.float32 else np.longdouble
    return TensorHandle((x.data.astype(wide) * y.data + z.data).astype(x.data.dtype), x.dtype)


used = {"pullback": 0, "search": 0}


@pytest.fixture(scope="session", autouse=True)
def kernels_on_the_cpu(request):
    from triton.runtime.interpreter import InterpreterBuilder
    InterpreterBuilder.create_fma = fma
    settings.load_profile("interpreter")

    @pullback.register_kernel("cpu")
    def _(g, z, q, gamma, mirror):
        used["pullback"] += 1
        return kernels.launch_pullback(g, z, q, gamma, mirror)

    @best_code.register_kernel("cpu")
    def _(z, codes, offset, tile):
        if z.dtype != torch.float32 or z.shape[1] > kernels.LONGEST_SEARCH: return best_code_definition(z, codes, offset, tile)
        used["search"] += 1
        return kernels.launch_search(z, codes, offset)

    yield
    if request.config.option.keyword == "": assert min(used.values()) > 0   # all tests ran
