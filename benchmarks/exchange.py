"""Other people's models with our layer in the place of theirs: states there and back, and one of
them trained with either.

    python benchmarks/exchange.py [--data DIR]

Needs `pip install transformers==5.24.0 encodec==0.1.1` (moshi too, where it installs: it asks for
an older PyTorch). First the states: quantizers of models that begin at random are converted to ours
and back, and compared on random input. Then a codec of `transformers`, DAC, made small, is trained
on the rows of the pictures as signals, with its own quantizer and with ours in its place, three
seeds each. Writes nbs/results/exchange.json. About a quarter of an hour on two cores.
"""

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rotvq import ResidualVQ, convert_back, convert_state_dict
from rotvq.layer.lookup import code_counts
from rotvq.run.data import ImageNet10, imagenet10
from rotvq.run.records import hardware

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results" / "exchange.json"
DIM, SIZE, LEVELS = 16, 32, 4


# States. Of each: their quantizer, the prefix of each of ours in it, ours, and their answer (value,
# indices (B, L, T)) to z (B, d, T).


def dac(weight_norm=False):
    from transformers import DacConfig, DacModel

    model = DacModel(
        DacConfig(
            encoder_hidden_size=2,
            downsampling_ratios=[2, 2, 2],
            decoder_hidden_size=DIM,
            upsampling_ratios=[2, 2, 2],
            n_codebooks=LEVELS,
            codebook_size=SIZE,
            codebook_dim=4,
            hidden_size=DIM,
        )
    )
    if weight_norm:
        model.apply_weight_norm()
    return (
        model.quantizer,
        {"": codec(learnable=True, distance="angle", codebook_dim=4, projection="each")},
        lambda quantizer, z: quantizer(z)[:2],
    )


def codec(levels=LEVELS, **options):
    return ResidualVQ(
        DIM, SIZE, levels, estimator="ste", commitment=0.25, channel_first=True, **options
    )


def encodec_of_transformers():
    from transformers import EncodecConfig, EncodecModel

    model = EncodecModel(
        EncodecConfig(
            num_filters=2,
            hidden_size=DIM,
            codebook_dim=DIM,
            codebook_size=SIZE,
            upsampling_ratios=[2, 2],
            target_bandwidths=[160.0],
            sampling_rate=32000,
        )
    )
    quantizer = model.quantizer
    quantizer.layers = quantizer.layers[:LEVELS]
    for layer in quantizer.layers:
        (
            layer.codebook.embed.normal_(),
            layer.codebook.cluster_size.uniform_(0, 3),
            layer.codebook.embed_avg.normal_(),
        )

    def answer(quantizer, z):
        indices = quantizer.encode(z)
        return quantizer.decode(indices), indices.movedim(0, 1)

    return quantizer, {"": codec()}, answer


def mimi():
    from transformers import MimiConfig, MimiModel

    config = MimiConfig(
        hidden_size=DIM,
        num_filters=2,
        num_hidden_layers=1,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        codebook_size=SIZE,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=LEVELS,
        num_semantic_quantizers=1,
        upsample_groups=DIM,
    )
    quantizer = MimiModel(config).quantizer
    for name, value in quantizer.named_buffers():
        if "embed_sum" in name:
            value.normal_()
        if "cluster_usage" in name:
            value.uniform_(0, 3)
    ours = {
        f"{name}_residual_vector_quantizer.": codec(levels, codebook_dim=8, projection_bias=False)
        for name, levels in (("semantic", 1), ("acoustic", LEVELS - 1))
    }

    def answer(quantizer, z):
        indices = quantizer.encode(z).movedim(0, 1)
        return quantizer.decode(indices), indices

    return quantizer, ours, answer


def encodec_of_meta():
    from encodec.quantization import ResidualVectorQuantizer

    quantizer = ResidualVectorQuantizer(DIM, LEVELS, SIZE, kmeans_init=False).train()
    for _ in range(3):
        quantizer(torch.randn(4, DIM, 50), 100)

    def answer(quantizer, z):
        found = quantizer(z, 100)
        return found.quantized, found.codes.movedim(0, 1)

    return quantizer, {"": codec()}, answer


def moshi():
    from moshi.quantization import SplitResidualVectorQuantizer

    quantizer = SplitResidualVectorQuantizer(
        dimension=8, input_dimension=DIM, output_dimension=DIM, n_q=LEVELS, bins=SIZE
    )
    for name, value in quantizer.named_buffers():
        if "embedding_sum" in name:
            value.normal_()
        if "cluster_usage" in name:
            value.uniform_(0, 3)
        if "_initialized" in name:
            value.fill_(1)
    ours = {
        f"rvq_{name}.": codec(levels, codebook_dim=8, projection_bias=False)
        for name, levels in (("first", 1), ("rest", LEVELS - 1))
    }

    def answer(quantizer, z):
        codes = quantizer.encode(z)
        return quantizer.decode(codes), codes

    return quantizer, ours, answer


PEERS: dict[str, tuple[str, Callable]] = {
    "DAC of transformers": ("transformers", dac),
    "DAC of transformers, weight norm": ("transformers", lambda: dac(True)),
    "EnCodec of transformers": ("transformers", encodec_of_transformers),
    "Mimi of transformers": ("transformers", mimi),
    "encodec": ("encodec", encodec_of_meta),
    "moshi": ("moshi", moshi),
}


@torch.no_grad()
def compared(name: str) -> dict:
    """How far ours and theirs are apart, relative to the largest number: values, and the state that
    came back. Raises where indices differ."""
    library, make = PEERS[name]
    torch.manual_seed(0)
    theirs, ours, answer = make()
    theirs.eval()
    state, z = theirs.state_dict(), torch.randn(4, DIM, 100)
    for prefix, stack in ours.items():
        load(stack, convert_state_dict(state, prefix), prefix)
    found = [stack.eval()(z) for stack in ours.values()]
    q, indices = sum(f.q for f in found), torch.cat([f.indices for f in found], -1).movedim(-1, 1)
    expected, theirs_indices = answer(theirs, z)
    if not torch.equal(indices, theirs_indices):
        raise AssertionError(
            f"{name}: {(indices != theirs_indices).sum()} of {indices.numel()} indices differ"
        )
    back = dict(state)
    for prefix, stack in ours.items():
        back = convert_back({prefix + k: v for k, v in stack.state_dict().items()}, back, prefix)
    theirs.load_state_dict(back)
    for part in theirs.modules():
        if hasattr(part, "_embed"):
            part._embed = None  # Mimi's codes, worked out once
    off = lambda a, b: (
        (a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-30)
    ).item()
    again, same = answer(theirs, z)
    assert torch.equal(same, indices)
    row = {
        "library": library,
        "version": importlib.metadata.version(library),
        "indices": indices.numel(),
        "values": off(q, expected),
        "back": off(again, expected),
    }
    if name == "DAC of transformers":
        row["gradients"] = gradients_of_dac(theirs, ours[""], z)
    return row


def gradients_of_dac(theirs, ours: ResidualVQ, z: Tensor) -> float:
    """Largest relative difference of the gradients of answer and losses: to z, to every projection,
    to every codebook."""
    with torch.enable_grad():
        z, g = z.requires_grad_(), torch.randn_like(z)
        q, _, _, commitment, codebook = theirs(z)
        found = ours(z)
        ours_of = lambda part: [m.weight for m in part] + [m.bias for m in part]
        own = [
            z,
            *ours_of(ours.project_in),
            *ours_of(ours.project_out),
            *(level.book.codes for level in ours.layers),
        ]
        theirs_of = lambda name: (
            [getattr(level, name).weight for level in theirs.quantizers]
            + [getattr(level, name).bias for level in theirs.quantizers]
        )
        other = [
            z,
            *theirs_of("in_proj"),
            *theirs_of("out_proj"),
            *(level.codebook.weight for level in theirs.quantizers),
        ]
        pairs = (
            ((found.q * g).sum(), (q * g).sum()),
            (found.loss, 0.25 * commitment.mean() + codebook.mean()),
        )
        worst = 0.0
        for a, b in pairs:
            for x, y in zip(
                torch.autograd.grad(a, own, retain_graph=True, allow_unused=True),
                torch.autograd.grad(b, other, retain_graph=True, allow_unused=True),
            ):
                if x is None and y is None:
                    continue  # no loss comes after the last projection up
                worst = max(worst, ((x - y.reshape(x.shape)).abs().max() / y.abs().max()).item())
    return worst


def load(stack: ResidualVQ, state: dict[str, Tensor], prefix: str) -> None:
    stack.load_state_dict(
        {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)} if prefix else state
    )


# One of these models, trained

LENGTH, STEPS, EVERY, BATCH, RATE, WIDTH = 128, 800, 100, 128, 2e-3, 8
WAYS = {
    "theirs": None,
    "ours, straight-through": dict(
        gradient="through", estimator="ste", learnable=True, distance="angle"
    ),
    "ours, rotation": dict(gradient="through", learnable=True, distance="angle"),
    "ours, rotation, running averages, revival": dict(gradient="through", revive_after="auto"),
    "ours, straight-through, losses apart": dict(
        gradient="held", estimator="ste", learnable=True, distance="angle"
    ),
    "ours, rotation, losses apart": dict(gradient="held", learnable=True, distance="angle"),
    "ours, rotation, running averages, revival, losses apart": dict(
        gradient="held", revive_after="auto"
    ),
}


class Quantizer(nn.Module):
    "Our stack, as `DacModel` asks its quantizer."

    def __init__(self, config, **options):
        super().__init__()
        self.n_codebooks = config.n_codebooks
        self.weight = config.codebook_loss_weight
        self.stack = ResidualVQ(
            config.hidden_size,
            config.codebook_size,
            config.n_codebooks,
            codebook_dim=config.codebook_dim,
            projection="each",
            channel_first=True,
            quantizer_dropout=config.quantizer_dropout,
            commitment=config.commitment_loss_weight,
            codebook_weight=self.weight,
            **options,
        )

    def forward(self, z, n_quantizers=None):
        q, indices, loss = self.stack(z, num_quantizers=n_quantizers)
        latents = self.latents(indices)
        # no commitment loss of its own: the stack's loss has both, weighed
        return q, indices.movedim(-1, 1), latents, 0, loss / self.weight

    def from_codes(self, codes):
        indices = codes.movedim(1, -1)
        return self.stack.decode(indices), self.latents(indices), codes

    def latents(self, indices):
        "The codes of all levels, `(B, L codebook_dim, T)`."
        return self.stack.codes(indices).movedim(0, 2).flatten(2).movedim(-1, 1)


def signals(split: str, source) -> Tensor:
    "Every fourth row of the pictures, as grey values in [−1, 1]: `(N, 1, LENGTH)`."
    images = ImageNet10(split, LENGTH, source).images
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    grey = torch.cat([(part.float() * weights).sum(1)[:, ::4] for part in images.split(500)])
    return grey.reshape(-1, 1, LENGTH) / 127.5 - 1


def small_dac():
    from transformers import DacConfig, DacModel

    ratios = [2, 4]
    return DacModel(
        DacConfig(
            encoder_hidden_size=WIDTH,
            downsampling_ratios=ratios,
            decoder_hidden_size=WIDTH * 4,
            upsampling_ratios=ratios[::-1],
            n_codebooks=LEVELS,
            codebook_size=64,
            codebook_dim=8,
            sampling_rate=16000,
        )
    )


def trained(way: str, seed: int, train: Tensor, val: Tensor) -> dict:
    torch.manual_seed(seed)
    model = small_dac()
    if WAYS[way] is not None:  # the exchange
        ours = Quantizer(model.config, **WAYS[way])
        if WAYS[way].get("learnable"):  # begins where theirs would have
            ours.stack.load_state_dict(convert_state_dict(model.quantizer.state_dict()))
        model.quantizer = ours
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    order, errors, start = torch.Generator().manual_seed(seed), [], time.perf_counter()
    for step in range(STEPS):
        x = train[torch.randint(len(train), (BATCH,), generator=order)]
        out = model.train()(x)
        loss = F.mse_loss(out.audio_values, x[:, 0]) + out.loss.mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
        if (step + 1) % EVERY == 0:
            errors.append(error(model, val))
    return {
        "way": way,
        "seed": seed,
        "mse": errors,
        "mse_by_level": [error(model, val, n + 1) for n in range(LEVELS)],
        "usage_by_level": usage(model, val),
        "seconds": round(time.perf_counter() - start),
    }


@torch.no_grad()
def error(model, x: Tensor, levels: int | None = None) -> float:
    model.eval()
    return (
        sum(
            F.mse_loss(
                model(part, n_quantizers=levels).audio_values, part[:, 0], reduction="sum"
            ).item()
            for part in x.split(512)
        )
        / x.numel()
    )


@torch.no_grad()
def usage(model, x: Tensor) -> list[float]:
    codes = torch.cat([model.encode(part).audio_codes for part in x.split(512)])
    return [
        (code_counts(level, model.config.codebook_size) > 0).float().mean().item()
        for level in codes.unbind(1)
    ]


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument(
        "--only", choices=("states", "trained"), help="do only this half; the other stays as it is"
    )
    args = options.parse_args()
    held = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if args.only != "trained":
        held["states"] = {}
        for name, (library, _) in PEERS.items():
            try:
                held["states"][name] = compared(name)
            except ImportError as missing:
                print(f"{name}: not tried, {missing}")
            else:
                print(name, held["states"][name], flush=True)
    if args.only != "states":
        source = imagenet10(args.data)
        train, val = signals("train", source), signals("val", source)[::28]
        held |= {
            "machine": hardware(torch.device("cpu"))["name"],
            "threads": torch.get_num_threads(),
            "signals": [len(train), len(val)],
            "runs": [],
        }
        for seed in (0, 1, 2):
            for way in WAYS:
                row = trained(way, seed, train, val)
                held["runs"].append(
                    {
                        k: [float(f"{x:.4g}") for x in v] if isinstance(v, list) else v
                        for k, v in row.items()
                    }
                )
                print(row, flush=True)
    RESULTS.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
