"""The kernels against float64 definitions, and the suites of the estimators and the lookup with the
kernels as operators."""

import math

import pytest
import torch

import interpreter
import test_codebook
import test_estimators
from rotvq.hardware import gpu
from rotvq.layer.gradients import pullback
from rotvq.layer.learning import average_definition
from rotvq.layer.lookup import code_sums_definition, nearest_code
from rotvq.layer.step import gradient_definition
from test_estimators import at_angle, draw, explicit, relative_error

BOUND = 6e-7  # seen: 5.1e-7; float32 rounds by 6e-8
NAMES = {"rotation": False, "reflection": True}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "n, d",
    [
        (300, 2),
        (300, 3),
        (200, 8),
        (100, 32),
        (33, 100),
        (20, 256),
        (5, 1000),
        (3, 4096),
        (2, 8192),
    ],
)
def test_random_rows(name, n, d):
    z, q, g = draw(d, n, d)
    exact, gamma = (
        explicit(name, z, q, g) if d < 2000 else in_blocks(name, z, q, g),
        torch.rand(n) + 0.5,
    )
    lam = q.double().norm(dim=1, keepdim=True) / z.double().norm(dim=1, keepdim=True)
    assert relative_error(pullback(g, z, q, None, NAMES[name]), exact).max() < BOUND
    assert (
        relative_error(
            pullback(g, z, q, gamma, NAMES[name]), exact / lam * gamma.double()[:, None]
        ).max()
        < BOUND
    )


@pytest.mark.parametrize("d", [1, 3, 32, 100])
def test_weighted_rows(d):
    """The rule's gradient in the same kernel: ends bit for bit, also where what is not asked for is
    not finite; rows with their own weight."""
    z, q, g = draw(d, 40, d)
    w = (torch.arange(40) % 4 / 2).clamp_max(1)
    z[4], q[8], z[12] = 0, torch.nan, torch.inf  # of rows with weight 0
    out, turned = pullback(g, z, q, None, False, w), pullback(g, z, q, None, False)
    assert torch.equal(out[w == 0], g[w == 0]) and torch.equal(out[w == 1], turned[w == 1])
    assert relative_error(out[w == 0.5], (g.double() + turned.double())[w == 0.5] / 2).max() < (
        BOUND if d > 1 else 1e-4
    )
    for one in (0.0, 0.3, 1.0):
        same = pullback(g, z, q, None, False, torch.tensor(one).expand(40))
        assert torch.equal(
            same.nan_to_num(7), pullback(g, z, q, None, False, torch.full((40,), one)).nan_to_num(7)
        )
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
    "To the last digit; the suite below has more angles and a wider bound."
    for k in (4, 8, 12):
        for d in (3, 100):
            angle = math.acos(1 - 10.0**-k)
            z, q, g = at_angle(k, 50, d, angle if name == "reflection" else math.pi - angle)
            z, q, g = (3.1 * z).float(), (0.7 * q).float(), g.float()
            found, exact = pullback(g, z, q, None, NAMES[name]), explicit(name, z, q, g)
            assert relative_error(found, exact).max() < BOUND, (d, k)


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
            off = (all_of.gather(1, chosen[:, None])[:, 0] - all_of.amin(1)) / (z - z.mean(0)).norm(
                dim=1
            ).double()
        else:
            all_of = torch.nn.functional.cosine_similarity(
                z.double()[:, None], codes.double(), dim=-1
            )
            off = all_of.amax(1) - all_of.gather(1, chosen[:, None])[:, 0]
        assert off.max() < 1e-5


@pytest.mark.parametrize("d", [1, 4, 33, 100])
def test_the_checks_at_first_use_pass(d):
    """The last length is too long for a lookup; the one before has lanes to spare. Both in two
    dtypes only, to save time."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)[: 4 if d < 9 else 2]:
        assert gpu.pullback_agrees(d, dtype, "cpu")
    for dtype in (torch.float32, torch.float64)[: 2 if d < 9 else 1]:
        assert gpu.differences_agree(d, dtype, "cpu")
    if d <= gpu.LONGEST_SEARCH:
        assert gpu.search_agrees(d, "cpu")
    if d <= gpu.LONGEST_LOOKUP:
        assert gpu.quantize_agrees(d, "cpu")  # and the lookup by itself
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert gpu.sums_agree(d, dtype, "cpu")
    assert gpu.averages_agree(d, "cpu") and gpu.gradients_agree(d, "cpu")


@pytest.mark.parametrize(
    "n, d, K",
    [(1, 1, 1), (1, 5, 300), (130, 64, 1), (64, 16, 64), (65, 17, 65), (200, 33, 257), (0, 4, 5)],
)
def test_the_whole_lookup_in_one_kernel(n, d, K):
    gen = torch.Generator().manual_seed(n)
    for far in (0.0, 30.0, 1e5):
        z, codes = (torch.randn(m, d, generator=gen) + far for m in (n, K))
        exact = (z[:, None].double() - codes.double()).square().sum(2)
        found = exact.gather(1, gpu.launch_lookup(z, codes)[:, None])[:, 0]
        assert (found.sqrt() <= exact.amin(1).sqrt() * (1 + 1e-5) + 1e-6).all()
        if n == 0:
            continue
        z[0], twice = codes[-1], torch.cat([codes, codes])  # equal codes: the first
        assert gpu.launch_lookup(z, twice)[0] < K
    if n > 60:
        codes[0], z[3] = torch.nan, torch.nan
        z[5, 0], z[7] = torch.inf, 3e38
        found = gpu.launch_lookup(z, codes)
        assert ((found >= 0) & (found < K)).all() and (K == 1 or (found[8:] > 0).all())


@pytest.mark.parametrize("decay, K, d", [(0.8, 64, 8), (0.0, 7, 3), (0.99, 300, 33), (0.5, 1, 1)])
def test_a_codebook_learns_the_same_by_kernels(decay, K, d):
    "Ten batches, one of nothing and one with a NaN, beside the definition."
    gen = torch.Generator().manual_seed(K)
    states = [
        [
            t.clone()
            for t in (
                torch.randn(K, d, generator=gen),
                torch.ones(K),
                torch.randn(K, d, generator=gen),
                torch.zeros(K).long(),
                torch.full((K,), 2**40),
                torch.tensor(0),
            )
        ]
    ]
    states.append([t.clone() for t in states[0]])
    for step in range(10):
        z = torch.randn(50, d, generator=gen)
        indices = torch.randint(-1, K, (50,), generator=gen) if step != 6 else torch.full((50,), -1)
        if step == 4:
            z[3, 0], indices[3] = torch.nan, 0
        good = average_definition(
            *states[0], code_sums_definition(z, indices, K), decay, "euclidean"
        )
        versions = [t._version for t in states[1]]
        assert (
            gpu.launch_average(*states[1], gpu.launch_sums(z, indices, K), decay)
            == good
            == (step not in (4, 6))
        )
        assert all(t._version > before for t, before in zip(states[1], versions))
    for a, b in zip(*states):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for k in (3, 4, 5):
        assert torch.equal(states[0][k], states[1][k])


def test_a_layer_learns_the_same_by_kernels(monkeypatch):
    "The operators are kernels here; the definitions are put in their place once."
    from rotvq import VectorQuantizer

    used, ends = dict(interpreter.used), []
    for definitions in (False, True):
        monkeypatch.setattr(interpreter, "DEFINITIONS_ONLY", definitions)
        torch.manual_seed(0)
        vq = VectorQuantizer(8, 32, estimator="rotation-until-used", channel_first=False)
        grads = []
        for _ in range(6):
            z = torch.randn(40, 8, requires_grad=True)
            q, _, loss = vq(z)
            grads += torch.autograd.grad((q.square().sum() + loss), z)
        vq(torch.randn(3, 40, 8), torch.rand(3, 40) < 0.7)  # with padding it goes in parts
        vq.learn()
        ends.append(
            [*grads, *(t.clone() for t in (vq.codebook, vq.counts, vq.sums, vq.idle, vq.batches))]
        )
        if not definitions:
            assert all(
                interpreter.used[name] > used[name]
                for name in ("lookup", "sums", "average", "quantize", "gradient")
            )
    for a, b in zip(*ends):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n, d, K", [(1, 1, 1), (130, 3, 40), (700, 8, 33), (65, 64, 100)])
@pytest.mark.parametrize("far", [0, 100])
def test_a_step_in_one_kernel(n, d, K, far):
    """Codes, loss and sums of the indices that it finds; of NaN, too. The ticket is 0 again, and
    many programs leave one loss."""
    gen = torch.Generator().manual_seed(n)
    z, codes = (torch.randn(m, d, generator=gen) + far for m in (n, K))
    exact = torch.cdist(z.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    sums, ticket = torch.zeros(K, d + 1, dtype=torch.float64), torch.zeros((), dtype=torch.int32)
    for times in (1, 2):
        value, q, indices, loss = gpu.launch_quantize(z, codes, 0.25, sums, ticket)
        assert (exact.gather(1, indices[:, None])[:, 0] <= exact.amin(1) * (1 + 1e-5) + 1e-5).all()
        assert (
            torch.equal(value, codes[indices])
            and torch.equal(q, value)
            and value.data_ptr() != q.data_ptr()
            and ticket == 0
        )
        torch.testing.assert_close(loss, 0.25 * (z - q).square().mean())
        torch.testing.assert_close(sums, times * code_sums_definition(z.double(), indices, K))
    assert torch.equal(gpu.launch_quantize(z, codes, 0.25, None, None)[2], indices)
    z[n // 2, 0] = torch.nan
    value, _, indices, loss = gpu.launch_quantize(z, codes, 0.25, sums, ticket)
    assert loss.isnan() and value.isfinite().all() and sums.isnan().any()


@pytest.mark.parametrize("d", [1, 2, 8, 33, 130])
@pytest.mark.parametrize("turns, mirror", [(True, False), (True, True), (False, False)])
def test_both_gradients_in_one_kernel(d, turns, mirror):
    n = 50 if d < 100 else 20
    z, q, g = draw(d, n, d)
    z[3], q[4], g_loss = 0, 0, torch.tensor(-3.0)
    for weight in (
        (None, torch.tensor(0.4).expand(n), torch.tensor(0.0).expand(n)) if turns else (None,)
    ):
        args = (
            g.double(),
            g_loss.double(),
            z.double(),
            q.double(),
            weight,
            turns,
            mirror,
            1.0 * n * d,
        )
        right, turned = gradient_definition(*args), gradient_definition(*args[:-1], 0.0)
        size = turned.norm(dim=1) + (right - turned).norm(
            dim=1
        )  # a sum of two, which may nearly cancel
        off = (
            gpu.launch_gradient(g, g_loss, z, q, weight, turns, mirror, 1.0 * n * d).double()
            - right
        ).norm(dim=1)
        assert (off <= 2e-6 * size).all()
    nothing = gpu.launch_gradient(g, 0 * g_loss, z, q, None, turns, mirror, 1.0)
    assert torch.equal(nothing, gpu.launch_pullback(g, z, q, None, mirror) if turns else g)


@pytest.mark.parametrize("d", [3, 8, 70])
def test_groups_far_apart(d):
    gen = torch.Generator().manual_seed(d)
    places = 1e3 * torch.randn(3, d, generator=gen)
    z, codes = (
        places.repeat_interleave(n, 0) + 0.1 * torch.randn(3 * n, d, generator=gen)
        for n in (20, 30)
    )
    exact = torch.cdist(z.double(), codes.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(nearest_code(z, codes), exact.argmin(1))


# the suites, but for what is about other forms, compiles, or needs longer vectors than the search
# kernel takes
# (and with fewer rows: the interpreter takes a millisecond for a program)
OTHERS = {
    "test_products_are_not_rounded_whatever_is_allowed",
    "test_the_setting_of_products_is_put_back_in_any_thread",
    "test_operator_and_definition_agree_with_the_matrix",
    "test_blocks_are_seamless",
    "test_the_default_compiler_keeps_the_accuracy_and_special_rows",
    "test_lookup_is_one_operator_of_a_compiled_graph",
    "test_a_bare_estimator_says_once_a_process_that_lambda_is_far_from_1",
    # lookups and sums again, many thousands of them
    "test_kmeans_ends_with_every_code_at_a_mean_or_at_a_point",
    "test_kmeans_of_many_half_precision_vectors",
}
for suite in (test_estimators, test_codebook):
    for name in dir(suite):
        if name.startswith("test_") and name not in OTHERS:
            globals()[f"{name}_with_kernels"] = getattr(suite, name)
