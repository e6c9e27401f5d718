"""The kernels of rotvq.hardware.gpu by themselves, on a GPU: whether they are right, how fast they
are, and what a call costs the host.

    python benchmarks/kernels.py

The gradient beside a copy of as many bytes, `rotate_to` and straight-through; the search beside
`addmm` and `argmax`, and `cdist`. Seconds of the device by events, medians; those of the host until
a call returns. Needs a GPU; writes nbs/results/kernels_<machine>.json and, from it,
nbs/benchmarks.qmd. Takes about half a minute. `--rehearse`: tiny sizes on a CPU, in Triton's
interpreter (TRITON_INTERPRET=1 must be in the environment).
"""

import argparse
import os
from pathlib import Path

import torch
from torch import nn
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from measure import machine, on_device, on_host, save
from quantizer import Plain
from rotvq import VectorQuantizer, rotation_trick
from rotvq.hardware import gpu
from rotvq.householder import householder_matrix
from rotvq.layer.gradients import pullback
from rotvq.layer.lookup import best_code_definition, lookup_definition, nearest_code
from rotvq.layer.surroundings import exact_products
from rotvq.rotation import rotation_matrix

GRADIENTS = [(65536, 32), (1048576, 32), (2097152, 64), (4194304, 4), (524288, 256), (131072, 1024)]
SEARCHES = [
    (n, d, K) for n in (16384, 131072) for d in (4, 16, 32, 64, 128, 256) for K in (1024, 8192)
]
SMALL = [(256, 4, 64), (4096, 32, 1024)]  # where the host is what takes the time
LONGEST = 128  # of the vectors that the search kernel is timed with


def errors(device: str, lengths=(2, 3, 4, 8, 12, 32, 64, 256)) -> dict:
    """Worst relative error of the gradient's kernel, against explicit matrices in float64; codes of
    the search kernel that are not the nearest."""
    worst, wrong, generator = {}, 0, torch.Generator().manual_seed(0)
    unit = lambda x: x / x.norm(dim=1, keepdim=True)
    for d in lengths:
        z, q, g = torch.randn(3, 512, d, generator=generator)
        q[:128] = 1e-3 * q[:128] - 2 * z[:128]  # nearly opposite
        a, b = z.double(), q.double()
        length = (b.norm(dim=1) / a.norm(dim=1))[:, None, None]
        forms = {
            "rotation": (False, rotation_matrix(a, b)),
            "reflection": (True, householder_matrix(unit(a) - unit(b))),
        }
        for name, (mirror, matrix) in forms.items():
            expected = ((length * matrix).mT @ g.double()[:, :, None])[..., 0]
            found = gpu.launch_pullback(
                g.to(device), z.to(device), q.to(device), None, mirror
            ).cpu()
            worst[f"{name}, d = {d}"] = (
                ((found.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
            )
        if d > LONGEST:
            continue
        codes = torch.randn(300, d, generator=generator)
        distances = torch.cdist(a, codes.double())
        found = gpu.launch_search(
            z.to(device), codes.to(device), -0.5 * codes.to(device).square().sum(1)
        ).cpu()
        wrong += int(
            (distances.gather(1, found[:, None])[:, 0] > (1 + 1e-5) * distances.amin(1)).sum()
        )
    return {"worst relative error": worst, "codes that are not nearest": wrong}


def trust(device: str, longest: int = 1024) -> dict:
    """Whether each kernel passes its check at first use, for vectors of at most `longest` numbers;
    one that does not is replaced by its definition."""
    upto = lambda *lengths: [d for d in lengths if d <= longest]
    verdicts = {
        f"pullback, d = {d}, {str(dtype).removeprefix('torch.')}": gpu.pullback_agrees(
            d, dtype, device
        )
        for d in upto(*sorted({3, 8, 12, *(d for _, d in GRADIENTS)}))
        for dtype in (torch.float32, torch.bfloat16)
    }
    verdicts |= {
        f"differences, d = {d}": gpu.differences_agree(d, torch.float32, device)
        for d in upto(4, 32, 256)
    }
    verdicts |= {f"search, d = {d}": gpu.search_agrees(d, device) for d in upto(4, 16, 32)}
    verdicts |= {f"lookup, d = {d}": gpu.lookup_agrees(d, device) for d in upto(4, 16, 32, 64)}
    verdicts |= {
        f"sums, d = {d}": gpu.sums_agree(d, torch.float32, device) for d in upto(4, 32, 256)
    }
    return verdicts | {f"average, d = {d}": gpu.averages_agree(d, device) for d in upto(4, 32, 256)}


def copy_rate(device: str, n: int) -> float:
    "Bytes read and written in a second by a copy of n floats."
    a = torch.randn(n, device=device)
    b = torch.empty_like(a)
    return 8 * n / on_device(lambda: b.copy_(a), device)


def gradient(n: int, d: int, dtype: torch.dtype, device: str, rate: float) -> dict:
    z, q, g = (torch.randn(n, d, device=device, dtype=dtype) for _ in range(3))
    z.requires_grad_()
    both = lambda f: lambda: torch.autograd.grad(f(z, q), z, g)
    held = z.detach()
    calls = {
        "kernel": lambda: gpu.launch_pullback(g, held, q, None, False),
        "rotation_trick": both(rotation_trick),
        "plain STE": both(lambda z, q: z + (q - z).detach()),
        "rotate_to": both(rotate_to),
    }
    times = {name: on_device(call, device) for name, call in calls.items()}
    least = 4 * n * d * dtype.itemsize / rate  # read three, write one
    return {
        "shape": [n, d],
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": times,
        "share_of_copy": least / times["kernel"],
    }


def search(n: int, d: int, K: int, device: str) -> dict:
    z, codes = torch.randn(n, d, device=device), torch.randn(K, d, device=device)
    offset = -0.5 * codes.square().sum(1)

    def products():
        with exact_products(device):
            return best_code_definition(z, codes, offset, 2**24)

    calls = {
        "addmm and argmax": products,
        "nearest_code": lambda: nearest_code(z, codes),
        "cdist": lambda: torch.cdist(z, codes).argmin(1),
    }
    calls["in parts"] = lambda: lookup_definition(z, codes, "euclidean", 2**24)
    found = {"shape": [n, d, K]}
    if d <= gpu.LONGEST_LOOKUP:
        calls["one kernel"] = lambda: gpu.launch_lookup(z, codes)
    if d <= LONGEST:
        calls["kernel"] = lambda: gpu.launch_search(z, codes, offset)
        found["same"] = (
            (calls["kernel"]() == products()).float().mean().item()
        )  # near ties may differ
    rounds = 15 if n * d * K < 2**32 else 5
    return found | {
        "seconds": {name: on_device(call, device, rounds) for name, call in calls.items()}
    }


def host(n: int, d: int, K: int, device: str, count: int = 200) -> dict:
    "Both ways through an estimator, and a training step of three layers."
    z, q, g = (torch.randn(n, d, device=device) for _ in range(3))
    z.requires_grad_()
    nets: dict[str, nn.Module] = {
        "rotvq": VectorQuantizer(d, K, channel_first=False),
        "vector_quantize_pytorch": VectorQuantize(d, K, decay=0.8, rotation_trick=True),
        "plain": Plain(d, K),
    }

    def step(net):
        value, _, loss = net(z)
        torch.autograd.grad((value, loss), z, (g, torch.ones_like(loss)))

    calls = {
        "rotvq::pullback": lambda: pullback(g, z.detach(), q, None, False),
        "rotation_trick, both ways": lambda: torch.autograd.grad(rotation_trick(z, q), z, g),
        "plain STE, both ways": lambda: torch.autograd.grad(z + (q - z).detach(), z, g),
    }
    calls |= {
        f"layer step, {name}": lambda net=net.to(device): step(net) for name, net in nets.items()
    }
    return {
        "shape": [n, d, K],
        "seconds": {name: on_host(call, device, count) for name, call in calls.items()},
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes on a CPU; the numbers mean nothing"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="default: nbs/results/kernels_<machine>.json, and the page",
    )
    args = parser.parse_args()
    device = "cpu" if args.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "PyTorch sees no CUDA device here, and this measures one. --rehearse shows on a CPU"
            " that the script runs."
        )
    if args.rehearse:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("A rehearsal needs TRITON_INTERPRET=1 in the environment.")
        import interpreter

        interpreter.kernels_on_the_cpu()
    result = {
        "machine": machine(device),
        "triton": gpu.triton.__version__,
        "rehearsal": args.rehearse,
    }

    def add(key, found):
        "Each result is on disk as soon as it is there."
        result[key] = (
            [*result.get(key, []), found] if isinstance(found, dict) and "shape" in found else found
        )
        if args.out:
            save(result, "kernels", args.out)
        print(key, found, flush=True)

    add("trusted", trust(torch.device(device), *([4] if args.rehearse else [])))
    add("errors", errors(device, (4, 12) if args.rehearse else (2, 3, 4, 8, 12, 32, 64, 256)))
    rate = copy_rate(device, 2**20 if args.rehearse else 2**28)
    add("copy_bytes_per_s", rate)
    for n, d in [(64, 4), (32, 32)] if args.rehearse else GRADIENTS:
        add("gradient", gradient(n, d, torch.float32, device, rate))
    add(
        "gradient",
        gradient(*(64, 4) if args.rehearse else GRADIENTS[2], torch.bfloat16, device, rate),
    )
    for shape in [(128, 4, 64)] if args.rehearse else SEARCHES:
        add("search", search(*shape, device))
    for shape in SMALL[:1] if args.rehearse else SMALL:
        add("host", host(*shape, device, 3 if args.rehearse else 200))
    save(result, "kernels", args.out)
    # the last one: what was measured is kept
    worst, far = (
        max(result["errors"]["worst relative error"].values()),
        result["errors"]["codes that are not nearest"],
    )
    other = max(1 - row["same"] for row in result["search"] if "same" in row)
    used = all(gpu.verdicts.values())  # no definition was measured in the place of a kernel
    if (
        not all(result["trusted"].values())
        or not used
        or not worst < 1e-5
        or far
        or not other < 1e-3
    ):
        raise SystemExit(
            f"A kernel is wrong: {result['trusted']} {gpu.verdicts}, worst relative error"
            f" {worst:.1e}, {far} codes are not nearest, {other:.1e} of them others than the"
            " library's"
        )


if __name__ == "__main__":
    main()
