"""What a GPU will run, without one: the step, the evaluation and k-means on fake CUDA tensors, and
the whole step on meta.

A fake tensor has a device and a shape and no numbers. So whatever asks for a number raises, and so
does an operation on two devices: a hidden wait for the GPU, or an operand that was left on the CPU,
fails here as it would cost or fail there.
"""

import dataclasses
import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from helpers import ROOT
from rotvq.layer.learning import Codebook
from rotvq.layer.lookup import kmeans
from rotvq.run.training import PRESETS, Learner, sums_of

pytestmark = pytest.mark.slow

SMALL = dataclasses.replace(
    PRESETS["cuda"], name="small", size=16, width=16, dim=8, codebook_size=32, batch=8
)
WAYS = {
    "plain": {},
    "float32": {"precision": "float32"},
    "revival": {"revive_after": 3},
    "cosine": {"distance": "cosine"},
    "averaged": {"ema": 0.9},
    "skip": {"skip": 0.2},
    "micro-batches": {"micro_batch": 4},
    "the paper's f8": {"downsamples": 3, "weight_decay": 1e-4},
}


needs_fakes = pytest.mark.skipif(
    not torch.__version__ >= "2.14",
    reason="an old PyTorch (2.6 was tried) wants a driver for fake CUDA tensors",
)


@contextmanager
def as_on_cuda(kind, dtype=torch.bfloat16, enabled=True):
    "`torch.autocast` without the question whether there is a GPU."
    before = torch.is_autocast_enabled(kind)
    torch.set_autocast_dtype(kind, dtype)
    torch.set_autocast_enabled(kind, enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, before)
        if not before:
            torch.clear_autocast_cache()


@pytest.fixture(autouse=True)
def autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", as_on_cuda)


def on_cuda(config, estimator: str = "rotation") -> Learner:
    """A learner whose tensors are fake CUDA tensors, made in a fake mode. (`.to` swaps tensors,
    which fake ones do not bear.)"""
    with unset_fake_temporarily():
        learner = Learner(config, estimator, 0, torch.device("cpu"))
    for module in [
        *learner.model.modules(),
        *(learner.trained.modules() if learner.average is not None else ()),
    ]:
        for name, p in module._parameters.items():
            module._parameters[name] = torch.nn.Parameter(
                torch.empty(p.shape, device="cuda").contiguous(
                    memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format
                )
            )
        for name, b in module._buffers.items():
            module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
        if isinstance(module, Codebook) and module.collected:
            module.collected = {
                name: torch.empty(c.shape, dtype=c.dtype, device="cuda")
                for name, c in module.collected.items()
            }
    learner.opt.param_groups[0]["params"] = list(learner.model.parameters())
    learner.device = torch.device("cuda")
    return learner


def one_step(learner: Learner, x: torch.Tensor) -> tuple:
    """A step without the backward pass, which PyTorch does not fake without CUDA: gradients are put
    in by hand."""
    parts = x.split(learner.config.micro_batch or len(x))
    found = [learner.losses(part) for part in parts]
    for p in learner.model.parameters():
        p.grad = torch.empty_like(p)
    learner.update()
    return found[-1]


def pictures(device="cuda"):
    return torch.empty(8, 3, 16, 16, device=device).contiguous(memory_format=torch.channels_last)


@needs_fakes
@pytest.mark.parametrize(
    "estimator", ["ste", "rotation", "rotation-until-used", "reflection", "rotation-then-ste"]
)
@pytest.mark.parametrize("way", list(WAYS))
def test_a_step_waits_for_nothing_and_stays_on_the_gpu(way, estimator):
    with FakeTensorMode():
        learner = on_cuda(dataclasses.replace(SMALL, **WAYS[way]), estimator)
        learner.begin(0)
        for _ in range(2):
            mse, commitment, indices = one_step(learner, pictures())
        assert {
            t.device.type for t in (mse, commitment, indices, *learner.model.state_dict().values())
        } == {"cuda"}
        assert mse.dtype == torch.float32 and indices.dtype == torch.int64
        assert {p.dtype for p in learner.model.parameters()} == {torch.float32}


@needs_fakes
def test_the_lookup_stays_in_float32_under_bfloat16(monkeypatch):
    import rotvq.layer.quantizer as quantizer

    seen = []
    real = quantizer.at_once
    monkeypatch.setattr(
        quantizer,
        "at_once",
        lambda z, codes, *options: (seen.append((z.dtype, codes.dtype)), real(z, codes, *options))[
            1
        ],
    )
    with FakeTensorMode():
        learner = on_cuda(SMALL)
        inside = []
        learner.model.encoder[0].register_forward_hook(
            lambda module, args, out: inside.append(out.dtype)
        )
        learner.begin(0)
        learner.losses(pictures())
    assert inside == [torch.bfloat16] and seen == [(torch.float32, torch.float32)]


@needs_fakes
@pytest.mark.parametrize("way", ["plain", "cosine", "averaged"])
def test_evaluation_reads_numbers_only_at_its_end(way):
    with FakeTensorMode(), torch.no_grad():
        learner = on_cuda(dataclasses.replace(SMALL, **WAYS[way]))
        parts = sums_of(learner.trained.eval(), pictures())
        assert [part.shape for part in parts] == [(3,), (32,), (8,), (8,)] and {
            part.device.type for part in parts
        } == {"cuda"}


@needs_fakes
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_kmeans_waits_for_nothing(monkeypatch, distance):
    """Dropping vectors that are not finite, before it, asks for their number, once in a run; and
    its draws come from the generator of the CPU, so they are numbers here too."""
    monkeypatch.setattr(
        torch, "rand", lambda count, **options: SimpleNamespace(tolist=lambda: [0.5] * count)
    )
    with FakeTensorMode():
        assert (
            kmeans(torch.empty(128, 8, device="cuda"), 32, 3, None, distance).device.type == "cuda"
        )


def test_the_trainings_prepared_for_a_gpu_can_begin():
    "benchmarks/rivals_128.jsonl"
    lines = (ROOT / "benchmarks" / "rivals_128.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == len(lines) > 20
    for about in map(json.loads, lines):
        config = dataclasses.replace(
            PRESETS[about.pop("preset")],
            **{key: value for key, value in about.items() if key not in ("estimator", "seed")},
        )
        assert config.size == 128 and not (
            config.micro_batch or config.ema or config.init == "kmeans"
        )  # see `Job`
        Learner(
            dataclasses.replace(config, width=8),
            about["estimator"],
            about["seed"],
            torch.device("meta"),
        ).begin(0)


@pytest.mark.parametrize("way", list(WAYS))
def test_the_whole_step_with_its_backward_pass_on_meta(way):
    config = dataclasses.replace(SMALL, **WAYS[way] | {"precision": "float32"})
    learner = Learner(config, "rotation", 0, torch.device("meta"))
    learner.begin(0)
    mse, counts = learner.step(pictures("meta"), 1e-4)
    assert mse.device.type == "meta" and counts.shape == (32,)


# What these would catch


def spoilt(monkeypatch, how):
    real = Learner.losses

    def losses(self, x):
        mse, commitment, indices = real(self, x)
        if how == "item":
            mse.item()
        if how == "branch" and mse > 1:
            commitment = commitment * 2
        if how == "operand":
            mse = mse + torch.ones(3).sum().reshape(1)
        if how == "choice":
            indices[indices > 3]
        return mse, commitment, indices

    monkeypatch.setattr(Learner, "losses", losses)


@needs_fakes
@pytest.mark.parametrize(
    "how, error",
    [
        ("item", DataDependentOutputException),
        ("branch", DataDependentOutputException),
        ("operand", Exception),
        ("choice", Exception),
    ],
)
def test_what_would_wait_or_be_left_behind_is_caught(monkeypatch, how, error):
    spoilt(monkeypatch, how)
    with FakeTensorMode():
        learner = on_cuda(SMALL)
        learner.begin(0)
        with pytest.raises(error) as caught:
            one_step(learner, pictures())
    words = {"item": "_local_scalar_dense", "branch": "", "operand": "cuda", "choice": ""}[how]
    assert words in str(caught.value) and not isinstance(caught.value, AssertionError)


@needs_fakes
def test_a_codebook_left_on_the_cpu_is_caught():
    with FakeTensorMode():
        learner = on_cuda(SMALL)
        learner.begin(0)
        learner.model.quantizer.codebook = learner.model.quantizer.codebook.cpu()
        with pytest.raises(Exception, match="cpu"):
            one_step(learner, pictures())
