"""The layer: a training step and a lookup, side by side with another library, a plain layer, and
the bare matrix product.

    python benchmarks/quantizer.py            # on the accelerator if there is one
    python benchmarks/quantizer.py --rounds 5

All candidates of a shape take turns in one run, so ratios are comparable even where the machine is
not quiet. Writes nbs/results/quantizer_<device>.json and, from it, nbs/benchmarks.qmd. Takes about
ten minutes on two cores and 5 GB of memory.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import VectorQuantize

from measure import in_turns, machine, save
from rotvq import VectorQuantizer

SHAPES = [(32768, 32, 1024), (16384, 256, 1024), (16384, 4, 8192), (4096, 64, 16384)]
BASE = (8192, 32, 1024)  # the curves change one of these
CURVES = {
    "N": [2048, 4096, 8192, 16384, 32768, 65536],
    "K": [256, 512, 1024, 2048, 4096, 8192],
    "d": [4, 16, 64, 256],
}


class Plain(nn.Module):
    """A layer as one would write it from the paper of the VQ-VAE: all distances, a one-hot matrix,
    straight-through."""

    def __init__(self, dim: int, codebook_size: int, decay: float = 0.8):
        super().__init__()
        self.decay = decay
        self.register_buffer("codebook", torch.randn(codebook_size, dim))
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", self.codebook.clone())

    def forward(self, z):
        indices = torch.cdist(z.detach(), self.codebook).argmin(1)
        q = self.codebook[indices]
        if self.training:
            with torch.no_grad():
                one_hot = F.one_hot(indices, len(self.codebook)).to(z.dtype)
                self.counts.lerp_(one_hot.sum(0), 1 - self.decay)
                self.sums.lerp_(one_hot.T @ z, 1 - self.decay)
                total = self.counts.sum()
                self.codebook.copy_(
                    self.sums
                    / ((self.counts + 1e-5) / (total + len(self.counts) * 1e-5) * total)[:, None]
                )
        return z + (q - z).detach(), indices, F.mse_loss(z, q.detach())


BARE = "product and argmax"


def product_and_argmax(z, codes, offset):
    """The scores of all codes, a tile at a time, and the place of the largest: no layer without a
    further idea does less."""
    rows = max(1, 2**20 // len(codes))
    return torch.cat([torch.addmm(offset, part, codes.T).argmax(1) for part in z.split(rows)])


def layers(d: int, K: int, device: str) -> dict[str, nn.Module]:
    "The three layers with one codebook."
    torch.manual_seed(0)
    plain, ours, theirs = (
        Plain(d, K),
        VectorQuantizer(d, K, channel_first=False),
        VectorQuantize(d, K, decay=0.8, commitment_weight=1.0, rotation_trick=True),
    )
    for held in (
        ours.codebook,
        ours.sums,
        theirs._codebook.embed[0],
        theirs._codebook.embed_avg[0],
    ):
        held.copy_(plain.codebook)
    return {
        "rotvq": ours.to(device),
        "vector_quantize_pytorch": theirs.to(device),
        "plain": plain.to(device),
    }


def measure(n: int, d: int, K: int, device: str, rounds: int) -> dict:
    gen = torch.Generator().manual_seed(1)  # another seed than that of the codes
    z, g = (torch.randn(n, d, generator=gen).to(device) for _ in range(2))
    z.requires_grad_()
    nets = layers(d, K, device)
    codes = nets["rotvq"].codebook.clone()
    offset = -0.5 * codes.square().sum(1)

    def step(net):
        q, _, loss = net(z)
        grad = torch.autograd.grad((q, loss), z, (g, torch.ones_like(loss)))[0]
        if net is nets["rotvq"]:
            net.learn()  # after each step, as `learn_after` does; the others learn in forward
        return grad

    def look(net):
        with torch.no_grad():
            return net(z)[1]

    for net in nets.values():
        net.eval()
    chosen = {name: look(net) for name, net in nets.items()} | {
        BARE: product_and_argmax(z.detach(), codes, offset)
    }
    for name, indices in chosen.items():
        assert (indices != chosen["rotvq"]).float().mean() < 1e-3, name  # rounding of near ties
    bare = {BARE: lambda: product_and_argmax(z.detach(), codes, offset)}
    lookup = in_turns(
        {name: lambda net=net: look(net) for name, net in nets.items()}
        | {"rotvq, encode": lambda: nets["rotvq"].encode(z)}
        | bare,
        rounds,
        device,
    )
    for net in nets.values():
        net.train()
    training = in_turns(
        {name: lambda net=net: step(net) for name, net in nets.items()} | bare, rounds, device
    )
    assert not torch.equal(nets["rotvq"].codebook, codes)
    return {"shape": [n, d, K], "training": training, "lookup": lookup}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only-shapes", action="store_true", help="no curves")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny shapes; the numbers mean nothing"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="default: nbs/results/quantizer_<device>.json, and the page",
    )
    args = parser.parse_args()

    def one(*shape):
        for _ in range(3):  # again where something else ran beside it
            held = measure(*shape, args.device, args.rounds)
            rows = [row for kind in ("training", "lookup") for row in held[kind].values()]
            if all(abs(q / row["median_s"] - 1) < 0.25 for row in rows for q in row["quartiles_s"]):
                break
        print(
            shape,
            {
                name: f"{1e3 * r['median_s']:.1f} ms, {r['peak_bytes'] / 2**20:.0f} MiB"
                for name, r in held["training"].items()
            },
            flush=True,
        )
        return held

    result = {
        "machine": machine(args.device),
        "rounds": args.rounds,
        "dtype": "float32",
        "shapes": [],
        "curves": {},
    }
    for shape in [(64, 4, 32), (64, 40, 32)] if args.rehearse else SHAPES:
        result["shapes"].append(one(*shape))
        if args.out:
            save(result, "quantizer", args.out)  # what there is, should time run out
    for axis, values in ({} if args.only_shapes else CURVES).items():
        result["curves"][axis] = [
            one(*(value if name == axis else base for name, base in zip("NdK", BASE)))
            for value in values
        ]
    save(result, "quantizer", args.out)


if __name__ == "__main__":
    main()
