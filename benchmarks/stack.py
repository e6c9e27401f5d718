"""A stack of eight levels: a training step and a lookup, side by side with the stack of another
library.

    OMP_NUM_THREADS=1 python benchmarks/stack.py     # on the accelerator if there is one

Eight levels of 1,024 codes, (8, 512, 64): without projections, and with one around the stack to
eight numbers. All take turns in one run. Counts the kernels of a step on a GPU at PyTorch's
dispatcher, too (benchmarks/traffic.py). Writes nbs/results/stack_<device>.json. Two minutes.
"""

import argparse
import json

import torch
from vector_quantize_pytorch import ResidualVQ as Theirs

from measure import ROOT, in_turns, machine
from rotvq import ResidualVQ
from traffic import counted, on_gpu

LEVELS, SIZE, SHAPE = 8, 1024, (8, 512, 64)
FORMS = {"no projection": {}, "one projection, to 8": {"codebook_dim": 8}}


def stacks(device: str, **options) -> dict:
    torch.manual_seed(0)
    ours = ResidualVQ(SHAPE[-1], SIZE, LEVELS, channel_first=False, init="normal", **options)
    theirs = Theirs(dim=SHAPE[-1], codebook_size=SIZE, num_quantizers=LEVELS, **options)
    ours.learn()  # from now on by hand, as `learn_after` does
    for level, other in zip(ours.layers, theirs.layers):
        for held in (other._codebook.embed[0], other._codebook.embed_avg[0]):
            held.copy_(level.codebook)
    if options:
        (
            ours.project_in[0].load_state_dict(theirs.project_in.state_dict()),
            ours.project_out[0].load_state_dict(theirs.project_out.state_dict()),
        )
    return {"rotvq": ours.to(device), "vector_quantize_pytorch": theirs.to(device)}


def step(net, z, g):
    q, _, loss = net(z)
    loss = loss.sum()
    torch.autograd.grad((q, loss), z, (g, torch.ones_like(loss)))
    if isinstance(net, ResidualVQ):
        net.learn()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    held = {
        "machine": machine(args.device),
        "rounds": args.rounds,
        "levels": LEVELS,
        "codes": SIZE,
        "shape": SHAPE,
        "forms": {},
    }
    for form, options in FORMS.items():
        nets, (z, g) = stacks(args.device, **options), torch.randn(2, *SHAPE, device=args.device)
        z.requires_grad_()
        for net in nets.values():
            net.eval()
        with torch.no_grad():
            chosen = [net(z)[1] for net in nets.values()]
        assert (
            chosen[0] != chosen[1]
        ).float().mean() < 1e-3  # rounding of near ties, and what comes after one
        lookup = in_turns(
            {name: torch.no_grad()(lambda net=net: net(z)) for name, net in nets.items()},
            args.rounds,
            args.device,
        )
        for net in nets.values():
            net.train()
        training = in_turns(
            {name: lambda net=net: step(net, z, g) for name, net in nets.items()},
            args.rounds,
            args.device,
        )
        on_cpu, (z, g) = stacks("cpu", **options), torch.randn(2, *SHAPE)
        z.requires_grad_()
        for net in on_cpu.values():
            [step(net, z, g) for _ in range(11)]  # beyond the one look at λ
        forms = on_gpu(SHAPE[0] * SHAPE[1], options.get("codebook_dim", SHAPE[-1]))
        kernels = {
            name: counted(lambda: step(net, z, g), forms if name == "rotvq" else {}, z.nbytes)[
                "kernels"
            ]
            for name, net in on_cpu.items()
        }
        held["forms"][form] = {"training": training, "lookup": lookup, "kernels": kernels}
        print(
            form,
            {
                name: (
                    f"{1e3 * row['median_s']:.1f} ms, eval {1e3 * lookup[name]['median_s']:.1f} ms,"
                    f" {kernels[name]} kernels"
                )
                for name, row in training.items()
            },
            flush=True,
        )
    (ROOT / "nbs" / "results" / f"stack_{args.device}.json").write_text(
        json.dumps(held, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
