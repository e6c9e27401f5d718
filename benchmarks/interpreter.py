"""Triton's interpreter in the place of a GPU. Set TRITON_INTERPRET=1 before triton is imported."""

import numpy as np
import torch

from rotvq.hardware import gpu
from rotvq.layer.gradients import pullback, pullback_definition
from rotvq.layer.learning import average, average_definition
from rotvq.layer.lookup import (
    best_code,
    best_code_definition,
    by_differences,
    by_differences_definition,
    code_sums_definition,
    lookup,
    lookup_definition,
    sum_by_code,
)
from rotvq.layer.step import gradient, gradient_definition, quantize, quantize_definition

DEFINITIONS_ONLY = False  # for a comparison
used = {
    "pullback": 0,
    "search": 0,
    "differences": 0,
    "average": 0,
    "lookup": 0,
    "sums": 0,
    "quantize": 0,
    "gradient": 0,
}


def fma(builder, x, y, z):
    """A GPU rounds x · y + z once; the interpreter would round the product before. Float64 holds
    every product of float32."""
    from triton.runtime.interpreter import TensorHandle

    wide = np.float64 if x.data.dtype == np.float32 else np.longdouble
    with np.errstate(all="ignore"):
        return TensorHandle((x.data.astype(wide) * y.data + z.data).astype(x.data.dtype), x.dtype)


def kernels_on_the_cpu() -> None:
    "Exact fused multiply-adds, and the kernels as the operators' forms for the CPU."
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_fma = fma

    @pullback.register_kernel("cpu")
    def _(g, z, q, gamma, mirror, weight=None):
        if DEFINITIONS_ONLY:
            return pullback_definition(g, z, q, gamma, mirror, weight)
        used["pullback"] += 1
        return gpu.launch_pullback(g, z, q, gamma, mirror, weight)

    @best_code.register_kernel("cpu")
    def _(z, codes, offset, tile):
        fits = z.dtype == torch.float32 and z.shape[1] <= gpu.LONGEST_SEARCH
        if DEFINITIONS_ONLY or not fits:
            return best_code_definition(z, codes, offset, tile)
        used["search"] += 1
        return gpu.launch_search(z, codes, offset)

    @by_differences.register_kernel("cpu")
    def _(z, codes, origin, indices, tile):
        if DEFINITIONS_ONLY:
            return by_differences_definition(z, codes, origin, indices, tile)
        used["differences"] += 1
        return gpu.launch_differences(z, codes, origin, indices)

    @lookup.register_kernel("cpu")
    def _(z, codes, distance, tile):
        fits = (
            z.dtype == torch.float32
            and z.shape[1] <= gpu.LONGEST_LOOKUP
            and distance == "euclidean"
        )
        # every other time in parts, which have kernels of their own
        used["lookup"] += fits
        if DEFINITIONS_ONLY or not fits or used["lookup"] % 2 == 0:
            return lookup_definition(z, codes, distance, tile)
        return gpu.launch_lookup(z, codes)

    @sum_by_code.register_kernel("cpu")
    def _(*args):
        if DEFINITIONS_ONLY:
            return code_sums_definition(*args)
        used["sums"] += 1
        return gpu.launch_sums(*args)

    @average.register_kernel("cpu")
    def _(*args):
        *state, decay, distance = args
        if (
            DEFINITIONS_ONLY
            or distance != "euclidean"
            or any(t.is_floating_point() and t.dtype != torch.float32 for t in state[:-1])
        ):
            return average_definition(*args)
        used["average"] += 1
        return gpu.launch_average(*state, decay)

    @quantize.register_kernel("cpu")
    def _(z, codes, distance, tile, commitment, sums, ticket):
        fits = (
            len(z)
            and z.dtype == torch.float32
            and z.shape[1] <= gpu.LONGEST_LOOKUP
            and distance == "euclidean"
        )
        if DEFINITIONS_ONLY or not fits:
            return quantize_definition(z, codes, distance, tile, commitment, sums, ticket)
        used["quantize"] += 1
        return gpu.launch_quantize(z, codes, commitment, sums, ticket)

    @gradient.register_kernel("cpu")
    def _(*args):
        if DEFINITIONS_ONLY or args[0].dtype != torch.float32:
            return gradient_definition(*args)
        used["gradient"] += 1
        return gpu.launch_gradient(*args)
