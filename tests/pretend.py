"""A CPU that passes for a GPU, to rehearse the tests for CUDA: what moves there and back is a copy,
as it would be.

Set ROTVQ_REHEARSE=1 (and TRITON_INTERPRET=1, so that the kernels run in Triton's interpreter). A
test that works here can still fail on a GPU; one that fails here would fail there: a leaf that
`.to()` made no leaf, a wrong name, a wrong shape.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
REHEARSED = os.environ.get("ROTVQ_REHEARSE") == "1"
GPU = torch.device("cpu" if REHEARSED else "cuda")  # where the tests for CUDA compute


def is_cuda(device) -> bool:
    return isinstance(device, str | torch.device) and str(device).split(":")[0] == "cuda"


class Pretence(TorchFunctionMode):
    "What is moved to a GPU, or from one, is copied; what is made on one is made on the CPU."

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (Tensor.cuda, Tensor.cpu):
            return args[0].clone()
        moves = function is Tensor.to and any(map(is_cuda, [*args[1:], kwargs.get("device")]))
        args = [torch.device("cpu") if is_cuda(a) else a for a in args]
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs | ({"copy": True} if moves else {}))


def begin() -> None:
    "For the rest of the process."
    import interpreter

    interpreter.kernels_on_the_cpu()
    torch.cuda.set_sync_debug_mode = lambda mode: None
    torch.cuda.synchronize = lambda device=None: None
    Pretence().__enter__()
