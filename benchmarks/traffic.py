"""Kernels launched and bytes moved, counted at PyTorch's dispatcher: what a GPU in eager mode has
to do, without one.

    python benchmarks/traffic.py

Every operation that is no view counts as one kernel that reads its arguments and writes its
results. An operator of rotvq counts as what a GPU runs for it: one kernel where there is one
(rotvq.hardware.gpu), else the operations of its definition. Compiled graphs are counted by Inductor
itself. Writes nbs/results/traffic.json and, from it, nbs/benchmarks.qmd. Takes a minute.
"""

import json
import logging
import math

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from measure import ROOT, page
from rotvq import VectorQuantizer, rotation_trick, rotation_until_used
from rotvq.hardware import cpu, gpu
from rotvq.layer import lookup
from rotvq.layer.gradients import pullback_definition, pullback_formula, rounding
from rotvq.layer.learning import average_definition
from rotvq.layer.lookup import (
    best_code_definition,
    by_differences_definition,
    code_sums,
    code_sums_definition,
    lookup_definition,
)
from rotvq.layer.quantizer import quantization_loss
from rotvq.layer.step import gradient_definition, quantize_definition

ESTIMATORS = [(65536, 32), (16384, 256), (65536, 4)]
LAYERS = [(32768, 32, 1024), (16384, 256, 1024), (16384, 4, 8192), (4096, 64, 16384)]


def in_float32(g, z, q, gamma, mirror, weight=None):
    "The definition on a device without float64."
    return pullback_formula(g, z, q, gamma, mirror, rounding(z))


FREE = ("detach", "_local_scalar_dense", "aten.empty", "aten.new_empty")  # they move nothing


class Traffic(TorchDispatchMode):
    """Counts kernels and bytes. `forms` says what an operator runs; one that is not named there is
    one kernel."""

    def __init__(self, forms: dict):
        super().__init__()
        self.forms, self.kernels, self.bytes = forms, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        form = self.forms.get(func)
        if form is not None:
            with self:
                return form(*args)
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not any(name in str(func) for name in FREE):
            self.count((args, kwargs, out))
        return out

    def count(self, tensors) -> None:
        "One kernel that reads or writes these."
        self.kernels += 1
        self.bytes += sum(
            held(t) * t.element_size() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)
        )


def held(t: torch.Tensor) -> int:
    "Its numbers, those of an expanded dimension once."
    return math.prod(size for size, step in zip(t.shape, t.stride()) if step)


NAMES = (
    "pullback",
    "lookup",
    "best_code",
    "by_differences",
    "sum_by_code",
    "average",
    "quantize",
    "gradient",
)
PULLBACK, LOOKUP, BEST_CODE, BY_DIFFERENCES, SUMS, AVERAGE, QUANTIZE, GRADIENT = (
    getattr(torch.ops.rotvq, name).default for name in NAMES
)
PROCESSORS = 132  # of an H100 or H200


class Kernel:
    """Stands where a Triton kernel is launched: counts it, and the tensors that it gets, as read or
    written once."""

    def __init__(self, seen: Traffic):
        self.seen = seen

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.seen.count(args)
            for t in args:  # indices that can be looked up, unseen by the count
                if isinstance(t, torch.Tensor) and t.dtype == torch.int64:
                    t.numpy().fill(0)

        return launch


def in_tiles(z, codes, offset, tile):
    return best_code_definition(z, codes, offset, 2**24)


def in_no_doubt(z, codes, origin, indices, tile):
    """The question whether a row is to be looked up again, and no such row: which there are depends
    on the machine's rounding."""
    return by_differences_definition(z, codes, z, indices, tile)


def on_gpu(n: int, d: int) -> dict:
    "What a GPU with Triton runs for n vectors of d numbers, by the code that launches it."
    forms = {PULLBACK: gpu.launch_pullback if d <= gpu.LONGEST else pullback_definition}
    forms |= {
        LOOKUP: (lambda z, codes, *_: gpu.launch_lookup(z, codes))
        if d <= gpu.LONGEST_LOOKUP
        else lookup_definition
    }
    forms |= {SUMS: gpu.launch_sums, AVERAGE: lambda *args: gpu.launch_average(*args[:-1])}
    forms |= {
        BY_DIFFERENCES: lambda z, codes, origin, indices, tile: gpu.launch_differences(
            z, codes, origin, indices
        )
    }
    fused = lambda z, codes, distance, tile, *more: gpu.launch_quantize(z, codes, *more)
    forms |= {QUANTIZE: fused if d <= gpu.LONGEST_LOOKUP else quantize_definition}
    forms |= {GRADIENT: gpu.launch_gradient if d <= gpu.LONGEST else gradient_definition}
    return forms | {
        BEST_CODE: (lambda z, codes, offset, tile: gpu.launch_search(z, codes, offset))
        if gpu.prefers_kernel(n, d, PROCESSORS)
        else in_tiles
    }


DEFINITIONS = {
    LOOKUP: lookup_definition,
    SUMS: code_sums_definition,
    AVERAGE: average_definition,
    QUANTIZE: quantize_definition,
    GRADIENT: gradient_definition,
}
WITHOUT_TRITON = DEFINITIONS | {
    PULLBACK: pullback_definition,
    BEST_CODE: in_tiles,
    BY_DIFFERENCES: in_no_doubt,
}
APPLE = WITHOUT_TRITON | {PULLBACK: in_float32}
CPU = DEFINITIONS | {
    PULLBACK: cpu.pullback_in_blocks,
    BEST_CODE: cpu.best_code_by_groups,
    BY_DIFFERENCES: in_no_doubt,
}


def counted(call, forms: dict, unit: int) -> dict:
    "Kernels, and bytes in multiples of `unit`."
    names = [
        f"{name}_kernel"
        for name in ("pullback", "lookup", "search", "differences", "sums", "totals", "average")
    ]
    real = [getattr(gpu, name) for name in names]
    with Traffic(forms) as seen:
        for name in names:
            setattr(gpu, name, Kernel(seen))
        at_once, lookup.SUMMED_AT_ONCE = lookup.SUMMED_AT_ONCE, 2**40  # in parts on a CPU only
        try:
            call()
        finally:
            lookup.SUMMED_AT_ONCE = at_once
            for name, kernel in zip(names, real):
                setattr(gpu, name, kernel)
    return {"kernels": seen.kernels, "bytes": seen.bytes / unit}


def compiled(f, z, q, g, unit: int) -> dict:
    """The same of the graphs that Inductor makes of `f`, forward and backward; it counts where it
    would log."""
    from torch._inductor import config, metrics

    torch._dynamo.reset()
    metrics.reset()
    logging.getLogger("torch._inductor.compile_fx").propagate = False
    torch._logging.set_logs(inductor_metrics=True)
    try:
        with config.patch(force_disable_caches=True):
            torch.autograd.grad(torch.compile(f, fullgraph=True)(z, q), z, g)
    finally:
        torch._logging.set_logs()
    return {"kernels": len(metrics.nodes_num_elem), "bytes": metrics.num_bytes_accessed / unit}


def estimators(n: int, d: int) -> dict:
    z, q, g = torch.randn(3, n, d, generator=torch.Generator().manual_seed(0))
    z.requires_grad_()
    unit = 4 * n * d
    once = lambda f: lambda: torch.autograd.grad(f(z, q), z, g)
    ste, half = lambda z, q: z + (q - z).detach(), torch.tensor(0.5)
    rows = {
        "rotvq, a GPU with Triton": counted(once(rotation_trick), on_gpu(n, d), unit),
        "rotvq, the rule, a GPU with Triton": counted(
            once(lambda z, q: rotation_until_used(z, q, half)), on_gpu(n, d), unit
        ),
        "rotvq, a GPU without Triton": counted(once(rotation_trick), WITHOUT_TRITON, unit),
        "rotvq, without float64 (Apple)": counted(once(rotation_trick), APPLE, unit),
        "rotvq, a CPU, in its cache": counted(once(rotation_trick), CPU, unit),
        "rotate_to": counted(once(rotate_to), {}, unit),
        "plain STE": counted(once(ste), {}, unit),
    }
    for name, f in (("rotvq", rotation_trick), ("rotate_to", rotate_to), ("plain STE", ste)):
        rows[f"{name}, compiled"] = compiled(f, z, q, g, unit)
    return {"shape": [n, d], "results": rows}


def layers(n: int, d: int, K: int, only: str = "") -> dict:
    "A step of each layer whose name begins with `only`."
    torch.manual_seed(0)
    z, g = torch.randn(2, n, d)
    z.requires_grad_()
    ours, theirs = (
        VectorQuantizer(d, K, channel_first=False, init="normal"),
        VectorQuantize(d, K, decay=0.8, commitment_weight=1.0, rotation_trick=True),
    )
    unit, one = 4 * n * d, torch.ones(())

    def step(net: nn.Module):
        def call():
            q, _, loss = net(z)
            torch.autograd.grad((q, loss), z, (g, one))
            if net is ours:
                net.learn()  # the peer's codes move in forward

        call(), [call() for _ in range(10)]  # beyond the one look at λ
        return call

    indices = ours.encode(z)
    rows = {
        "rotvq, a GPU with Triton": lambda: counted(step(ours), on_gpu(n, d), unit),
        "rotvq, a GPU without Triton": lambda: counted(step(ours), WITHOUT_TRITON, unit),
        "vector_quantize_pytorch": lambda: counted(step(theirs), {}, unit),
        "rotvq, the sums alone": lambda: counted(
            lambda: code_sums(z, indices, K), on_gpu(n, d), unit
        ),
        "rotvq, the losses alone": lambda: counted(loss_of(ours, z, indices), {}, unit),
    }
    results = {name: count() for name, count in rows.items() if name.startswith(only)}
    return {"shape": [n, d, K], "results": results}


def loss_of(net, z, indices):
    q = net.codebook[indices]
    return lambda: torch.autograd.grad(quantization_loss(net._rows(z, None), q, 1.0, False), z)


def main():
    held = {"torch": torch.__version__, "estimators": [], "layers": []}
    for shape in ESTIMATORS:
        held["estimators"].append(estimators(*shape))
        print(
            shape,
            {
                k: f"{v['kernels']}, {v['bytes']:.1f} z"
                for k, v in held["estimators"][-1]["results"].items()
            },
            flush=True,
        )
    for shape in LAYERS:
        held["layers"].append(layers(*shape))
        print(
            shape,
            {
                k: f"{v['kernels']}, {v['bytes']:.1f} z"
                for k, v in held["layers"][-1]["results"].items()
            },
            flush=True,
        )
    (ROOT / "nbs" / "results" / "traffic.json").write_text(
        json.dumps(held, indent=1) + "\n", encoding="utf-8"
    )
    page()


if __name__ == "__main__":
    main()
