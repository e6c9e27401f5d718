"""Rotation trick, forward and backward: time and memory, side by side with straight-through and
other implementations.

    python benchmarks/estimators.py           # all shapes, on the accelerator if there is one
    python benchmarks/estimators.py --device cpu --rounds 15

All candidates of a shape take turns in one run, so ratios are comparable even where the machine is
not quiet. Writes nbs/results/estimators_<device>.json and, from it, nbs/benchmarks.qmd. Takes about
five minutes on two cores.
"""

import argparse
from pathlib import Path

import torch
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from measure import in_turns, machine, save
from rotvq import rotation_trick

SHAPES = [(65536, 32), (16384, 256), (262144, 4), (1024, 1024)]


def plain_ste(z, q):
    return z + (q - z).detach()


def batched_matrices(z, q):
    "The formula as batched (1, d) @ (d, 1) products: no d × d matrix, many small ones."
    norm = lambda v: v.norm(dim=-1, keepdim=True)
    zh, qh = (z / norm(z)).detach(), q / norm(q)
    rh = (zh + qh) / norm(zh + qh)
    row, column, e = (lambda v: v[:, None]), (lambda v: v[..., None]), z[:, None]
    e = e - 2 * (e @ column(rh)) @ row(rh) + 2 * (e @ column(zh)) @ row(qh)
    return e[:, 0] * (norm(q) / norm(z)).detach()


def candidates():
    torch._dynamo.reset()
    compiled = lambda f: torch.compile(f, fullgraph=True, dynamic=False)
    return {
        "plain STE": plain_ste,
        "plain STE, compiled": compiled(lambda z, q: plain_ste(z, q)),
        "rotvq": rotation_trick,
        "rotvq, compiled": compiled(lambda z, q: rotation_trick(z, q)),
        "rotate_to": rotate_to,
        "rotate_to, compiled": compiled(lambda z, q: rotate_to(z, q)),
        "batched matrices": batched_matrices,
    }


def once(f, z, q, g):
    return torch.autograd.grad(f(z, q), z, g)[0]


def measure(n: int, d: int, device: str, rounds: int) -> dict:
    gen = torch.Generator().manual_seed(0)
    z, q, g = (torch.randn(n, d, generator=gen).to(device) for _ in range(3))
    z.requires_grad_()
    forms = candidates()
    for f in forms.values():
        for _ in range(3):
            once(f, z, q, g)
    exact = once(rotation_trick, z.detach().double().requires_grad_(), q.double(), g.double())
    for name in forms.keys() - {
        "plain STE",
        "plain STE, compiled",
    }:  # the same function, up to rounding
        error = (once(forms[name], z, q, g) - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.quantile(0.999) < 1e-3 and (
            not name.startswith("rotvq") or error.max() < 1e-5
        ), (name, error.max())
    out = in_turns(
        {name: lambda f=f: once(f, z, q, g) for name, f in forms.items()}, rounds, device
    )
    return {"shape": [n, d], "input_bytes": 4 * n * d, "results": out}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="default: nbs/results/estimators_<device>.json, and the page",
    )
    args = parser.parse_args()
    shapes = []
    for n, d in SHAPES:
        shapes.append(measure(n, d, args.device, args.rounds))
        times = {name: f"{1e3 * r['median_s']:.2f} ms" for name, r in shapes[-1]["results"].items()}
        print(f"({n}, {d})", times, flush=True)
    result = {
        "machine": machine(args.device),
        "rounds": args.rounds,
        "dtype": "float32",
        "shapes": shapes,
    }
    save(result, "estimators", args.out)


if __name__ == "__main__":
    main()
