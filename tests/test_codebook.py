"""Lookup, k-means and running averages against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rotvq.codebook import perplexity, usage
from rotvq.layer.lookup import (
    best_code,
    code_counts,
    code_sums,
    ema_update,
    kmeans,
    kmeans_plus_plus,
    nearest_code,
)


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 40),
    K=st.integers(1, 30),
    d=st.integers(1, 12),
    tile=st.sampled_from([None, 1, 17, 64]),
)
def test_lookup_on_integer_vectors_is_exact_with_ties_to_the_lowest(seed, n, K, d, tile):
    g = torch.Generator().manual_seed(seed)
    z, codes = torch.randint(-2, 3, (n, d), generator=g), torch.randint(-2, 3, (K, d), generator=g)
    distances = (z[:, None] - codes).square().sum(-1)
    # brute force in integers: the first index at which the least distance stands
    expected = torch.tensor(
        [row.tolist().index(min(row.tolist())) for row in distances], dtype=torch.int64
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(nearest_code(z.to(dtype), codes.to(dtype), tile), expected)


def test_lookup_error_in_float32_is_rounding_only():
    g = torch.Generator().manual_seed(0)
    z, codes = torch.randn(4000, 32, generator=g), torch.randn(1024, 32, generator=g)
    distances = torch.cdist(z.double(), codes.double())
    chosen = distances.gather(1, nearest_code(z, codes)[:, None])[:, 0]
    assert ((chosen - distances.amin(1)) / chosen).max() < 1e-6


def test_lookup_keeps_float32_under_autocast_and_runs_on_meta():
    z, codes = torch.randn(200, 16), torch.randn(300, 16)
    expected = nearest_code(z, codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code(z, codes), expected)
    assert nearest_code(z.to("meta"), codes.to("meta")).shape == (200,)


@pytest.mark.parametrize(
    "z, codes, error",
    [
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 4), TypeError),
        (torch.zeros(3, 4), torch.zeros(2, 5), ValueError),
        (torch.zeros(3, 4), torch.zeros(0, 4), ValueError),
        (torch.zeros(3, 4), torch.zeros(4), ValueError),
    ],
)
def test_lookup_refuses(z, codes, error):
    with pytest.raises(error):
        nearest_code(z, codes)


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), K=st.integers(1, 80))
def test_kmeans_ends_with_every_code_at_a_mean_or_at_a_point(seed, n, K):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g, dtype=torch.float64)
    codes = kmeans(z, K, steps=50, generator=g)
    assert codes.shape == (K, 3) and codes.isfinite().all()
    indices = nearest_code(z, codes)
    for k in indices.unique():
        assert_close(codes[k], z[indices == k].mean(0))


@pytest.mark.parametrize("dead", [1, 150, 250])
@pytest.mark.parametrize("shift", [0.0, 1e2, 1e4])
def test_lookup_far_from_the_origin(shift, dead):
    g = torch.Generator().manual_seed(0)
    z, codes = torch.randn(1000, 16, generator=g) + shift, torch.randn(256, 16, generator=g) + shift
    codes[:dead] = 0  # dead codes at the origin must not spoil it
    distances = torch.cdist(z.double(), codes.double())
    chosen = distances.gather(1, nearest_code(z, codes)[:, None])[:, 0]
    assert ((chosen - distances.amin(1)) / chosen).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kmeans_of_many_half_precision_vectors(dtype):
    z = (torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    assert_close(kmeans(z, 1)[0], z.float().mean(0).to(dtype))


@pytest.mark.parametrize("spoil", ["empty", "nan", "inf", "overflow", "padding"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_batch_without_good_vectors_leaves_everything_alone(spoil, distance):
    state = torch.randn(4, 2), torch.rand(4), torch.randn(4, 2)
    before = [x.clone() for x in state]
    z, indices = torch.randn(6, 2), torch.tensor([0, 1, 1, 2, 3, 3])
    if spoil == "empty":
        z, indices = z[:0], indices[:0]
    if spoil == "nan":
        z[2, 1] = torch.nan
    if spoil == "inf":
        z[2, 1] = torch.inf
    if spoil == "overflow":
        z[4:] = 3e38
    if spoil == "padding":
        indices = torch.full((6,), -1)
    ema_update(*state, code_sums(z, indices, 4), decay=0.0, distance=distance)
    assert all(torch.equal(a, b) for a, b in zip(state, before))


def test_kmeans_refuses():
    with pytest.raises(ValueError, match="N ≥ 1"):
        kmeans(torch.zeros(0, 3), 4)
    with pytest.raises(ValueError, match="manhattan.*choose"):
        kmeans(torch.zeros(5, 3), 4, distance="manhattan")


@given(seed=st.integers(0, 10**6), decay=st.one_of(st.just(0.0), st.floats(1e-9, 0.99)))
def test_running_average_equals_the_one_hot_form(seed, decay):
    g = torch.Generator().manual_seed(seed)
    K, d = 12, 3
    codebook, counts, sums = (
        torch.randn(K, d, generator=g, dtype=torch.float64),
        torch.ones(K, dtype=torch.float64),
        torch.randn(K, d, generator=g, dtype=torch.float64),
    )
    z, indices = (
        torch.randn(30, d, generator=g, dtype=torch.float64),
        torch.randint(K, (30,), generator=g),
    )
    one_hot = torch.nn.functional.one_hot(indices, K).double()
    N, m = decay * counts + (1 - decay) * one_hot.sum(0), decay * sums + (1 - decay) * one_hot.T @ z
    before = codebook.clone()
    ema_update(codebook, counts, sums, code_sums(z, indices, K), decay)
    assert_close(counts, N)
    assert_close(sums, m)
    expected = m / ((N + 1e-5) / (N.sum() + K * 1e-5) * N.sum())[:, None]
    # with decay 0, one without vectors stays, as in k-means
    assert_close(codebook, torch.where(N[:, None] > 0, expected, before))


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 200),
    K=st.one_of(st.integers(1, 300), st.integers(1000, 2200)),
    d=st.sampled_from([3, 9]),
    tile=st.integers(1, 80_000),
)
def test_search_by_groups_finds_the_first_of_the_largest(seed, n, K, d, tile):
    g = torch.Generator().manual_seed(seed)
    z, codes, offset = (
        torch.randint(-2, 3, shape, generator=g).float() for shape in ((n, d), (K, d), (K,))
    )
    scores = z @ codes.T + offset
    expected = torch.tensor([row.index(max(row)) for row in scores.tolist()], dtype=torch.int64)
    assert torch.equal(best_code(z, codes, offset, tile), expected)


def test_search_answers_with_a_code_also_for_what_is_not_finite():
    z = torch.full((8, 5), torch.nan)
    z[4:] = torch.inf
    z[6:, 0] = -torch.inf
    for K in (1, 65, 1000):
        indices = nearest_code(z, torch.randn(K, 5, generator=torch.Generator().manual_seed(0)))
        assert ((indices >= 0) & (indices < K)).all()


@given(seed=st.integers(0, 10**6), d=st.integers(1, 9))
def test_cosine_lookup_is_the_smallest_angle_at_any_length(seed, d):
    g = torch.Generator().manual_seed(seed)
    z, codes = (
        torch.randn(40, d, generator=g, dtype=torch.float64),
        torch.randn(90, d, generator=g, dtype=torch.float64),
    )
    similarity = torch.nn.functional.cosine_similarity(z[:, None], codes, dim=-1)
    indices = nearest_code(
        z * torch.rand(40, 1, generator=g).mul(20).exp(),
        codes * torch.rand(90, 1, generator=g).add(0.01),
        distance="cosine",
    )
    assert_close(similarity.gather(1, indices[:, None])[:, 0], similarity.amax(1))
    with pytest.raises(ValueError, match="l1.*choose"):
        nearest_code(z, codes, distance="l1")


def test_lookup_is_one_operator_of_a_compiled_graph():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    z, codes = (
        torch.randn(3000, 4, generator=torch.Generator().manual_seed(0)),
        torch.randn(500, 4, generator=torch.Generator().manual_seed(1)),
    )
    f = lambda z, codes: nearest_code(z, codes, tile=1000)  # 1500 tiles
    assert torch.equal(
        torch.compile(f, fullgraph=True, backend=keep)(z, codes), nearest_code(z, codes)
    )
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(calls) < 40 and any("best_code" in str(node.target) for node in calls)
    torch.library.opcheck(
        torch.ops.rotvq.best_code.default, (z[:50], codes, codes[:, 0].clone(), 7)
    )


@given(seed=st.integers(0, 10**6), n=st.integers(1, 50), K=st.integers(1, 60), d=st.integers(1, 4))
def test_seeds_are_distinct_points_while_there_are_enough(seed, n, K, d):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g)
    rows = kmeans_plus_plus(z, K, g)
    assert rows.shape == (K,) and rows.min() >= 0 and rows.max() < n
    assert len(rows.unique()) == min(n, K)
    assert len(kmeans_plus_plus(z[:1].expand(n, d), K, g)) == K  # all points alike


def test_seeds_follow_the_squared_distance():
    z = torch.tensor([[0.0], [1.0], [3.0]])
    pairs = torch.stack(
        [kmeans_plus_plus(z, 2, torch.Generator().manual_seed(k)) for k in range(3000)]
    )
    after_first = pairs[pairs[:, 0] == 0][:, 1]
    assert after_first.eq(2).float().mean() == pytest.approx(0.9, abs=0.03)  # 9 / (1 + 9)


def test_kmeans_by_angle_ends_with_unit_codes():
    g = torch.Generator().manual_seed(0)
    codes = kmeans(torch.randn(500, 6, generator=g) * 7, 20, generator=g, distance="cosine")
    assert_close(codes.norm(dim=1), torch.ones(20))


def test_sums_and_counts_leave_padding_out():
    g = torch.Generator().manual_seed(0)
    z, indices = torch.randn(100, 3, generator=g), torch.randint(-1, 5, (100,), generator=g)
    batch = code_sums(z, indices, 5)
    for k in range(5):
        assert_close(
            batch[k], torch.cat([z[indices == k].sum(0), (indices == k).sum()[None].float()])
        )
    assert torch.equal(code_counts(indices.view(4, 25), 5), batch[:, -1])
    assert (
        code_sums(z.bfloat16(), indices, 5).dtype == torch.float32
        and code_sums(z.double(), indices, 5).dtype == torch.float64
    )
    assert (
        usage(batch[:, -1]) == 1
        and 1 < perplexity(batch[:, -1]) <= 5
        and perplexity(torch.zeros(3)) == 1
    )


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_products_are_not_rounded_whatever_is_allowed(allowed):
    "Which a CPU with bfloat16 products would do at medium, and a GPU at high."
    g = torch.Generator().manual_seed(0)
    z, codes = torch.randn(2000, 64, generator=g), torch.randn(512, 64, generator=g)
    right = nearest_code(z, codes)
    torch.set_float32_matmul_precision(allowed)
    try:
        assert torch.equal(nearest_code(z, codes), right)
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_lookup_for_each_codebook_by_vmap():
    g = torch.Generator().manual_seed(0)
    z, codes = torch.randn(3, 40, 5, generator=g), torch.randn(3, 30, 5, generator=g)
    each = torch.stack([nearest_code(a, b) for a, b in zip(z, codes)])
    assert torch.equal(torch.func.vmap(nearest_code)(z, codes), each)
    one = torch.stack([nearest_code(a, codes[0]) for a in z])
    assert torch.equal(torch.func.vmap(nearest_code, in_dims=(0, None))(z, codes[0]), one)


def test_the_setting_of_products_is_put_back_in_any_thread():
    "What was inherited stays inherited; of many threads the last one puts back what was allowed."
    from concurrent.futures import ThreadPoolExecutor

    g = torch.Generator().manual_seed(0)
    z, codes = torch.randn(500, 64, generator=g), torch.randn(64, 64, generator=g)
    right = nearest_code(z, codes)
    torch.set_float32_matmul_precision("medium")
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: nearest_code(z, codes), range(200)))
        assert all(torch.equal(indices, right) for indices in found)
        assert torch.get_float32_matmul_precision() == "medium"
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="a setting of PyTorch 2.9"
)
def test_an_inherited_setting_stays_inherited():
    from rotvq.layer.surroundings import exact_products

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision = "none", "tf32"
    try:
        with exact_products("cuda"):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = "none", before


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_vector_does_not_move_the_origin_of_the_others(bad):
    g = torch.Generator().manual_seed(0)
    z, codes = torch.randn(400, 8, generator=g) + 100, torch.randn(100, 8, generator=g) + 100
    codes[0] = 1e6
    right = nearest_code(z[1:], codes)
    z[0, 3] = bad
    assert torch.equal(nearest_code(z, codes)[1:], right)


def test_two_devices_are_refused():
    with pytest.raises(ValueError, match="cpu.*meta"):
        nearest_code(torch.randn(3, 4), torch.randn(5, 4, device="meta"), distance="cosine")


SMALL = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.int32]


@pytest.mark.parametrize("dtype", SMALL)
def test_tokens_kept_in_small_integers_are_counted(dtype):
    assert code_counts(torch.tensor([0, 1, 1, 3]).to(dtype), 512)[:4].tolist() == [1, 2, 0, 1]
