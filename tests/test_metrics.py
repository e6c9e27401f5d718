"""Metrics of pictures: against the library or a slow form, and what the judge says of pictures
whose answer is known."""

import json
import math
from importlib.resources import files

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotvq.run.data import SAMPLE, ImageNet10, decode_picture, list_pictures
from rotvq.run.metrics import (
    Judge,
    frechet_distance,
    judge_classes,
    judged,
    load_judge,
    perceptual,
    psnr,
)
from rotvq.run.training import to_float


def pictures(n=8):
    return to_float(ImageNet10("val", 32, SAMPLE, n).images)


def slow_frechet(a, b):
    "With the matrix square root of the product, by its eigenvalues, which need not be symmetric."
    a, b = a.double().numpy(), b.double().numpy()
    c, d = np.cov(a.T), np.cov(b.T)
    cross = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * cross


@given(st.integers(0, 1000), st.integers(2, 8))
def test_frechet_distance_against_a_slow_form(seed, d):
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(50, d, generator=generator) @ torch.randn(d, d, generator=generator) + i
        for i in range(2)
    )
    assert frechet_distance(a, b) == pytest.approx(slow_frechet(a, b), rel=1e-4, abs=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6, abs=1e-8)


def test_frechet_distance_of_sets_without_spread():
    a, b = torch.zeros(5, 3), torch.ones(5, 3)
    assert frechet_distance(a, a) == 0 and frechet_distance(a, b) == pytest.approx(3)


def test_perceptual_is_what_torchmetrics_says_and_survives_without_a_network(capsys):
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    x = pictures()
    noisy = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(
        -1, 1
    )
    found = perceptual(x, noisy, batch=3)
    assert set(found) == {"ssim", "lpips", "r_fid", "r_is"}
    assert found["ssim"] == pytest.approx(
        structural_similarity_index_measure(noisy, x, data_range=2.0).item(), rel=1e-4
    )
    said = capsys.readouterr().err
    for key, name in (("lpips", "LPIPS"), ("r_fid", "r-FID"), ("r_is", "r-IS")):
        assert math.isnan(found[key]) == (f"no {name}" in said)
    assert psnr((noisy - x).square().mean().item()) == pytest.approx(
        peak_signal_noise_ratio(noisy, x, data_range=2.0).item(), rel=1e-5
    )


def test_perceptual_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional.image", None)
    with pytest.raises(ValueError, match=r"rotvq\[metrics\]"):
        perceptual(pictures(2), pictures(2))


def test_judge_takes_any_size_and_is_frozen():
    judge = load_judge()
    assert (
        not judge.training
        and not any(p.requires_grad for p in judge.parameters())
        and all(p.dtype == torch.float32 for p in judge.parameters())
    )
    for size in (32, 64, 128):
        assert judge(torch.zeros(2, 3, size, size)).shape == (2, 10)
    assert Judge.WIDTHS[-1] == judge.features(torch.zeros(1, 3, 64, 64)).shape[1]


def test_judged_against_the_plain_definition():
    judge, x = load_judge(), pictures(24)
    x_hat = torch.nn.functional.avg_pool2d(x, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)
    labels = torch.arange(24) % 10
    found = judged(judge, x, x_hat, labels, batch=5)
    assert found["judge_originals"] == pytest.approx(
        (judge(x).argmax(1) == labels).float().mean().item()
    )
    assert found["judge_reconstructions"] == pytest.approx(
        (judge(x_hat).argmax(1) == labels).float().mean().item()
    )
    assert found["judge_distance"] == pytest.approx(
        frechet_distance(judge.features(x), judge.features(x_hat)), rel=1e-3
    )
    assert found["judge_distance"] > judged(judge, x, x, labels)["judge_distance"]


def test_the_weights_are_those_that_were_measured():
    """What they say of the bundled photographs was written down with their accuracy; where
    ROTVQ_DATA names ImageNet-10, as in CI, that is measured again."""
    about = json.loads((files("rotvq") / "judge" / "about.json").read_text())
    photos = [p for split in ("train", "val") for p in list_pictures(SAMPLE.root, split)[0]]
    x = to_float(torch.stack([torch.tensor(decode_picture(p, 64)) for p in photos]))
    judge = load_judge()
    assert (
        dict(zip((p.stem for p in photos), judge(x).argmax(1).tolist())) == about["answers"]
        and len(set(about["answers"].values())) > 2
    )
    held = ImageNet10("val", 64, limit=400)
    if held.classes == judge_classes():
        right = (judge(to_float(held.images)).argmax(1) == held.labels).float().mean()
        assert abs(right - about["accuracy"]) < 0.06
