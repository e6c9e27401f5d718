"""Lookup, k-means and running averages against brute force."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rotvq.codebook import ema_update, kmeans, nearest_code


@given(seed=st.integers(0, 10**6), n=st.integers(0, 40), K=st.integers(1, 30), d=st.integers(1, 12), tile=st.sampled_from([None, 1, 17, 64]))
def test_lookup_on_integer_vectors_is_exact_with_ties_to_the_lowest(seed, n, K, d, tile):
    g = torch.Generator().manual_seed(seed)
    z, codes = torch.randint(-2, 3, (n, d), generator=g), torch.randint(-2, 3, (K, d), generator=g)
    distances = (z[:, None] - codes).square().sum(-1)
    # brute force in integers: the first index at which the least distance stands
    expected = torch.tensor([row.tolist().index(min(row.tolist())) for row in distances], dtype=torch.int64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16): assert torch.equal(nearest_code(z.to(dtype), codes.to(dtype), tile), expected)


def test_lookup_error_in_float32_is_rounding_only():
    g = torch.Generator().manual_seed(0)
    z, codes = torch.randn(4000, 32, generator=g), torch.randn(1024, 32, generator=g)
    distances = torch.cdist(z.double(), codes.double())
    chosen = distances.gather(1, nearest_code(z, codes)[:, None])[:, 0]
    assert ((chosen - distances.amin(1)) / chosen).max() < 1e-6


def test_lookup_keeps_float32_under_autocast_and_runs_on_meta():
    z, codes = torch.randn(200, 16), torch.randn(300, 16)
    expected = nearest_code(z, codes)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(nearest_code(z, codes), expected)
    assert nearest_code(z.to("meta"), codes.to("meta")).shape == (200,)


@pytest.mark.parametrize("z, codes, error", [
    (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 4), TypeError), (torch.zeros(3, 4), torch.zeros(2, 5), ValueError),
    (torch.zeros(3, 4), torch.zeros(0, 4), ValueError), (torch.zeros(3, 4), torch.zeros(4), ValueError)])
def test_lookup_refuses(z, codes, error):
    with pytest.raises(error): nearest_code(z, codes)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), K=st.integers(1, 80))
def test_kmeans_ends_with_every_code_at_a_mean_or_at_a_point(seed, n, K):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g, dtype=torch.float64)
    codes = kmeans(z, K, steps=50, generator=g)
    assert codes.shape == (K, 3) and codes.isfinite().all()
    indices = nearest_code(z, codes)
    for k in indices.unique(): assert_close(codes[k], z[indices == k].mean(0))


@pytest.mark.parametrize("shift", [0.0, 1e2, 1e4])
def test_lookup_far_from_the_origin(shift):
    g = torch.Generator().manual_seed(0)
    z, codes = torch.randn(1000, 16, generator=g) + shift, torch.randn(256, 16, generator=g) + shift
    codes[0] = 0                                                         # a dead code at the origin must not spoil it
    distances = torch.cdist(z.double(), codes.double())
    chosen = distances.gather(1, nearest_code(z, codes)[:, None])[:, 0]
    assert ((chosen - distances.amin(1)) / chosen).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kmeans_of_many_half_precision_vectors(dtype):
    z = (torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    assert_close(kmeans(z, 1)[0], z.float().mean(0).to(dtype))


def test_an_empty_batch_leaves_the_codebook_alone():
    codebook, counts, sums = torch.randn(4, 2), torch.ones(4), torch.randn(4, 2)
    before = codebook.clone()
    ema_update(codebook, counts, sums, torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), decay=0.0)
    assert torch.equal(codebook, before)


def test_kmeans_refuses_no_vectors():
    with pytest.raises(ValueError, match="N ≥ 1"): kmeans(torch.zeros(0, 3), 4)


@given(seed=st.integers(0, 10**6), decay=st.floats(0, 0.99))
def test_running_average_equals_the_one_hot_form(seed, decay):
    g = torch.Generator().manual_seed(seed)
    K, d = 12, 3
    codebook, counts, sums = torch.randn(K, d, generator=g, dtype=torch.float64), torch.ones(K, dtype=torch.float64), torch.randn(K, d, generator=g, dtype=torch.float64)
    z, indices = torch.randn(30, d, generator=g, dtype=torch.float64), torch.randint(K, (30,), generator=g)
    one_hot = torch.nn.functional.one_hot(indices, K).double()
    N, m = decay * counts + (1 - decay) * one_hot.sum(0), decay * sums + (1 - decay) * one_hot.T @ z
    ema_update(codebook, counts, sums, z, indices, decay)
    assert_close(counts, N)
    assert_close(sums, m)
    assert_close(codebook, m / ((N + 1e-5) / (N.sum() + K * 1e-5) * N.sum())[:, None])
