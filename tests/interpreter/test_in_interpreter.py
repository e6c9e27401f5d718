"""The kernels against float64 definitions, and the suites of the estimators and the lookup with the kernels as operators."""
import math

import pytest
import torch

import test_codebook
import test_estimators
from rotvq import kernels
from rotvq.codebook import nearest_code
from rotvq.rotation import pullback
from test_estimators import at_angle, draw, explicit, relative_error

BOUND = 6e-7                                                              # seen: 5.1e-7; float32 rounds by 6e-8
NAMES = {"rotation": False, "reflection": True}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n, d", [(300, 2), (300, 3), (200, 8), (100, 32), (33, 100), (20, 256), (5, 1000), (3, 4096), (2, 8192)])
def test_random_rows(name, n, d):
    z, q, g = draw(d, n, d)
    exact, gamma = explicit(name, z, q, g) if d < 2000 else in_blocks(name, z, q, g), torch.rand(n) + 0.5
    lam = q.double().norm(dim=1, keepdim=True) / z.double().norm(dim=1, keepdim=True)
    assert relative_error(pullback(g, z, q, None, NAMES[name]), exact).max() < BOUND
    assert relative_error(pullback(g, z, q, gamma, NAMES[name]), exact / lam * gamma.double()[:, None]).max() < BOUND


@pytest.mark.parametrize("d", [1, 3, 32, 100])
def test_weighted_rows(d):
    "The rule's gradient in the same kernel: ends bit for bit, also where what is not asked for is not finite; rows with their own weight."
    z, q, g = draw(d, 40, d)
    w = (torch.arange(40) % 4 / 2).clamp_max(1)
    z[4], q[8], z[12] = 0, torch.nan, torch.inf                           # of rows with weight 0
    out, turned = pullback(g, z, q, None, False, w), pullback(g, z, q, None, False)
    assert torch.equal(out[w == 0], g[w == 0]) and torch.equal(out[w == 1], turned[w == 1])
    assert relative_error(out[w == 0.5], (g.double() + turned.double())[w == 0.5] / 2).max() < (BOUND if d > 1 else 1e-4)
    for one in (0.0, 0.3, 1.0):
        same = pullback(g, z, q, None, False, torch.tensor(one).expand(40))
        assert torch.equal(same.nan_to_num(7), pullback(g, z, q, None, False, torch.full((40,), one)).nan_to_num(7))
    assert torch.equal(pullback(g, z, q, None, False, torch.tensor(0.0).expand(40)), g)


def in_blocks(name, z, q, g):
    "The same without a d × d matrix."
    z, q, g = z.double(), q.double(), g.double()
    zh, qh = z / z.norm(dim=1, keepdim=True), q / q.norm(dim=1, keepdim=True)
    r = zh + qh if name == "rotation" else zh - qh
    dot = lambda u, v: (u * v).sum(1, keepdim=True)
    out = g - 2 * r * dot(r, g) / dot(r, r) + (2 * zh * dot(qh, g) if name == "rotation" else 0)
    return out * q.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", NAMES)
def test_nearly_opposite_and_nearly_parallel(name):
    for k in range(1, 13):
        for d in (2, 3, 8, 100):
            angle = math.acos(1 - 10.0**-k)
            z, q, g = at_angle(k, 50, d, angle if name == "reflection" else math.pi - angle)
            z, q, g = (3.1 * z).float(), (0.7 * q).float(), g.float()
            assert relative_error(pullback(g, z, q, None, NAMES[name]), explicit(name, z, q, g)).max() < BOUND, (d, k)


@pytest.mark.parametrize("name", NAMES)
def test_norms_far_from_one(name):
    for p in range(-30, 31, 6):
        for r in (-30, -p, 30):
            z, q, g = at_angle(p + 100, 20, 7, 1.3)
            z, q, g = (z * 10.0**p).float(), (q * 10.0**r).float(), g.float()
            exact = explicit(name, z, q, g)
            fits = (exact.abs().amax(1) < 3e38) & (exact.abs().amax(1) > 1e-34)
            error = relative_error(pullback(g, z, q, None, NAMES[name]), exact)[fits]
            assert not len(error) or error.max() < BOUND, (p, r)


@pytest.mark.parametrize("d", [1, 4, 16])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_search_finds_the_nearest(d, distance):
    gen = torch.Generator().manual_seed(d)
    for shift in (0.0, 1e2, 1e4):
        z, codes = (torch.randn(n, d, generator=gen) + shift for n in (130, 200))
        chosen = nearest_code(z, codes, distance=distance)
        if distance == "euclidean":
            all_of = torch.cdist(z.double(), codes.double())
            off = (all_of.gather(1, chosen[:, None])[:, 0] - all_of.amin(1)) / (z - z.mean(0)).norm(dim=1).double()
        else:
            all_of = torch.nn.functional.cosine_similarity(z.double()[:, None], codes.double(), dim=-1)
            off = all_of.amax(1) - all_of.gather(1, chosen[:, None])[:, 0]
        assert off.max() < 1e-5


@pytest.mark.parametrize("d", [1, 4, 32, 33, 256])
def test_the_checks_at_first_use_pass(d):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16): assert kernels.pullback_agrees(d, dtype, "cpu")
    for dtype in (torch.float32, torch.float64): assert kernels.differences_agree(d, dtype, "cpu")
    if d <= kernels.LONGEST_SEARCH: assert kernels.search_agrees(d, "cpu")


@pytest.mark.parametrize("d", [3, 8, 70])
def test_groups_far_apart(d):
    gen = torch.Generator().manual_seed(d)
    places = 1e3 * torch.randn(3, d, generator=gen)
    z, codes = (places.repeat_interleave(n, 0) + 0.1 * torch.randn(3 * n, d, generator=gen) for n in (20, 30))
    exact = torch.cdist(z.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(nearest_code(z, codes), exact.argmin(1))


# the suites, but for what is about other forms, compiles, or needs longer vectors than the search kernel takes
# (and with fewer rows: the interpreter takes a millisecond for a program)
OTHERS = {"test_products_are_not_rounded_whatever_is_allowed", "test_the_setting_of_products_is_put_back_in_any_thread",
          "test_operator_and_definition_agree_with_the_matrix", "test_blocks_are_seamless", "test_the_default_compiler_keeps_the_accuracy_and_special_rows"}
for suite in (test_estimators, test_codebook):
    for name in dir(suite):
        if name.startswith("test_") and name not in OTHERS: globals()[f"{name}_with_kernels"] = getattr(suite, name)
