"""Values and gradients of the three estimators against explicit float64 matrices, and on inputs
that break formulas."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from rotvq import linear_estimator, reflection_trick, rotation_trick, straight_through
from rotvq.layer.gradients import pullback, pullback_definition

TRICKS = {"ste": straight_through, "rotation": rotation_trick, "reflection": reflection_trick}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gradient(trick, z, q, g, **kw):
    z = z.detach().clone().requires_grad_()
    return torch.autograd.grad(trick(z, q, **kw), z, g)[0]


def explicit(name, z, q, g):
    "λMᵀg in float64 by the outer-product formulas, not by ours."
    z, q, g = z.double(), q.double(), g.double()
    if name == "ste":
        return g
    zh, qh = z / z.norm(dim=-1, keepdim=True), q / q.norm(dim=-1, keepdim=True)
    eye = torch.eye(z.shape[-1], dtype=torch.float64)
    outer = lambda a, b: a[..., :, None] * b[..., None, :]
    if name == "rotation":
        M = (
            eye
            + 2 * outer(qh, zh)
            - 2 * outer(zh + qh, zh + qh) / (zh + qh).square().sum(-1)[..., None, None]
        )
    else:
        M = eye - 2 * outer(zh - qh, zh - qh) / (zh - qh).square().sum(-1)[..., None, None]
    return (q.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True)) * torch.einsum(
        "...ij,...i->...j", M, g
    )


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(
        3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


@pytest.mark.parametrize("name", TRICKS)
@given(
    seed=st.integers(0, 10**6),
    lead=st.sampled_from([(), (1,), (7,), (2, 3), (0,), (4, 0)]),
    d=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_value_is_q_bit_for_bit(name, seed, lead, d, dtype):
    z, q, g = draw(seed, *lead, d, dtype=dtype)
    out = TRICKS[name](z.requires_grad_(), q)
    assert out.dtype == dtype and torch.equal(out, q)
    assert torch.autograd.grad(out, z, g)[0].shape == z.shape


def at_angle(seed, n, d, angle):
    "z and g random, q at `angle` (radians) to z; unit lengths, float64."
    z, u, g = draw(seed, n, d, dtype=torch.float64)
    z = z / z.norm(dim=-1, keepdim=True)
    u = u - (u * z).sum(-1, keepdim=True) * z
    return z, math.cos(angle) * z + math.sin(angle) * u / u.norm(dim=-1, keepdim=True), g


def relative_error(ours, exact):
    return (ours.double() - exact).norm(dim=-1) / exact.norm(dim=-1)


@pytest.mark.parametrize("name", TRICKS)
@given(seed=st.integers(0, 10**6), d=st.integers(2, 64), scale=st.floats(-4, 4))
def test_gradient_equals_the_explicit_matrix(name, seed, d, scale):
    z, q, g = draw(seed, 100, d)
    q = q * 10**scale
    assert relative_error(gradient(TRICKS[name], z, q, g), explicit(name, z, q, g)).max() < 1e-5


@pytest.mark.parametrize("name", ["rotation", "reflection"])
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(2, 40),
    lead=st.sampled_from([(20,), (2, 5), (1,)]),
    dtype=st.sampled_from(DTYPES),
    angle=st.one_of(
        st.floats(0, math.pi),
        st.floats(-6, 0).map(lambda k: math.pi - 10**k),
        st.floats(-6, 0).map(lambda k: 10**k),
    ),
    powers=st.tuples(*[st.floats(-30, 30)] * 2),
)
def test_any_dtype_norm_and_angle(name, seed, d, lead, dtype, angle, powers):
    z, q, g = at_angle(seed, math.prod(lead), d, angle)
    if dtype == torch.float16:
        powers = [p / 8 for p in powers]  # 1e-3.75 … 1e3.75
    z, q, g = ((v * 10.0**p).view(*lead, d).to(dtype) for v, p in zip((z, q, g), (*powers, 0)))
    ours, exact = gradient(TRICKS[name], z, q, g), explicit(name, z, q, g)
    sign, unit = (
        (1 if name == "rotation" else -1),
        lambda v: v.double() / v.double().norm(dim=-1, keepdim=True),
    )
    normal = (unit(z) + sign * unit(q)).norm(dim=-1)  # of the rounded vectors
    fits = (exact.abs().amax(-1) < torch.finfo(dtype).max) & (
        exact.norm(dim=-1) > 1e3 * torch.finfo(dtype).tiny
    )
    assert ours[exact.abs().amax(-1) < torch.finfo(dtype).max].isfinite().all()
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 2 * torch.finfo(dtype).eps)
    error = relative_error(ours, exact)[fits & (normal > 1e-6)]  # below, z and q count as parallel
    assert not len(error) or error.max() < tolerance


@pytest.mark.parametrize("name", ["rotation", "reflection"])
@pytest.mark.parametrize("compiled", [False, True])
def test_nearly_opposite_and_nearly_parallel(name, compiled):
    "1 + cos θ from 1e-1 to 1e-12 (for the mirror 1 − cos θ), in eager mode and as one graph."
    trick = (
        torch.compile(TRICKS[name], fullgraph=True, backend="aot_eager")
        if compiled
        else TRICKS[name]
    )
    for d in (2, 3, 8, 100):
        for k in range(1, 13):
            z, q, g = at_angle(
                k,
                50,
                d,
                (
                    math.acos(1 - 10.0**-k)
                    if name == "reflection"
                    else math.pi - math.acos(1 - 10.0**-k)
                ),
            )
            z, q, g = (3.1 * z).float(), (0.7 * q).float(), g.float()
            assert relative_error(gradient(trick, z, q, g), explicit(name, z, q, g)).max() < 1e-5, (
                d,
                k,
            )


def test_operator_and_definition_agree_with_the_matrix():
    "Whatever form computes on this device, and the definition; with rows of every kind."
    for d in (1, 2, 5, 8, 33):
        z, q, g = draw(d, 3000, d)
        q[:50], z[50:60], z[60:70] = -z[:50] * 1.5, z[50:60] * 1e-20, z[60:70] * 1e20
        q[:50, 0] += 1e-4  # nearly opposite, but a direction to turn in
        gamma = torch.rand(3000) + 0.5
        for mirror, name in ((False, "rotation"), (True, "reflection")):
            slow = explicit(name, z, q, g) if d > 1 else None
            lam = q.double().norm(dim=-1, keepdim=True) / z.double().norm(dim=-1, keepdim=True)
            unit = lambda v: v.double() / v.double().norm(dim=-1, keepdim=True)
            turns = (unit(z) + (-1 if mirror else 1) * unit(q)).norm(
                dim=-1
            ) > 1e-6  # the others count as parallel: no matrix
            for given_gamma in (None, gamma):
                fast, defined = (
                    pullback(g, z, q, given_gamma, mirror),
                    pullback_definition(g, z, q, given_gamma, mirror),
                )
                assert relative_error(fast, defined.double()).max() < 1e-5
                if d > 1:
                    expected = slow if given_gamma is None else slow / lam * gamma[:, None]
                    for ours in (fast, defined):
                        assert relative_error(ours, expected)[turns].max() < 1e-5


@pytest.mark.parametrize("gamma", [None, torch.rand(6)])
@pytest.mark.parametrize("mirror", [False, True])
def test_the_operator_keeps_the_rules_of_operators(gamma, mirror):
    z, q, g = draw(19, 6, 5)
    torch.library.opcheck(torch.ops.rotvq.pullback.default, (g, z, q, gamma, mirror))
    torch.library.opcheck(
        torch.ops.rotvq.pullback.default, (g.T.contiguous().T, z, q, gamma, mirror)
    )


def test_blocks_are_seamless(monkeypatch):
    "More rows than fit into one block, and a last block that is not full."
    for d in (3, 16):
        z, q, g = draw(d, 1000, d)
        whole = gradient(rotation_trick, z, q, g)
        monkeypatch.setattr("rotvq.hardware.cpu.BLOCK", 64 * d + 1)
        assert_close(gradient(rotation_trick, z, q, g), whole, rtol=1e-6, atol=1e-6)
        monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None,
    reason="torch.compile needs a C++ compiler on a CPU",
)
def test_the_default_compiler_keeps_the_accuracy_and_special_rows():
    z, q, g = draw(11, 2000, 8)
    z[0], q[1], z[2, 1], q[3] = 0, 0, math.nan, -2 * z[3]
    z[4], q[5] = z[4] * 1e-30, q[5] * 1e30
    compiled = torch.compile(rotation_trick, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(z, q), q)
    grad = gradient(compiled, z, q, g)
    assert torch.equal(grad[:2], g[:2]) and not grad[2].isfinite().any()
    assert relative_error(grad[5:], explicit("rotation", z, q, g)[5:]).max() < 1e-5
    assert relative_error(grad[4:5], explicit("rotation", z, q, g)[4:5]).max() < 1e-5
    assert_close((z[3] * grad[3]).sum(), (q[3] * g[3]).sum())


def test_gradients_beyond_the_range_of_their_dtype():
    "±∞ where the true entry does not fit, the true value where all fit, never NaN."
    for z, q, g, expected in [
        ([1e-30, 0], [0, 1e30], [0, 1e-35], [1e25, 0]),
        ([1e-30, 0], [0, 1e30], [0.0, 0], [0, 0]),
        ([1e30, 0], [0, 1e-30], [0, 1e30], [1e-30, 0]),
        ([1.0, 0], [0, 1.0], [3e37, 3e37], [3e37, -3e37]),
        ([1e-45, 0], [0, 1e-45], [1.0, 2], [2, -1]),
    ]:
        grad, expected = (
            gradient(rotation_trick, *(torch.tensor(v) for v in (z, q, g))),
            torch.tensor(expected),
        )
        assert (
            relative_error(grad, expected.double()).nan_to_num(0) < 1e-5 and grad.isfinite().all()
        )
    huge = gradient(
        rotation_trick, torch.tensor([1e-30, 0]), torch.tensor([0, 1e30]), torch.tensor([1.0, 2])
    )  # λ = 1e60
    assert huge.tolist() == [math.inf, -math.inf]
    half = gradient(
        rotation_trick,
        *(torch.tensor(v, dtype=torch.float16) for v in ([1.0, 0], [0, 2.0], [6e4, 100.0])),
    )
    assert_close(half, torch.tensor([200, -math.inf], dtype=torch.float16))


@pytest.mark.parametrize("name", TRICKS)
def test_one_bad_row_does_not_spread(name):
    z, q, g = draw(12, 4000, 4)
    clean = gradient(TRICKS[name], z, q, g)
    for bad in (math.nan, math.inf):
        for which in range(3):
            operands = [z.clone(), q.clone(), g.clone()]
            operands[which][17, 2] = bad
            grad = gradient(TRICKS[name], *operands)
            others = torch.arange(4000) != 17
            assert_close(grad[others], clean[others], rtol=1e-6, atol=1e-6)
            if name != "ste" or which == 2:
                assert not grad[17].isfinite().all()


@pytest.mark.parametrize("name", ["rotation", "reflection"])
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 16),
    exponents=st.tuples(*[st.integers(-30, 30)] * 2),
)
def test_kept_angle_and_inner_product_at_any_norm(name, seed, d, exponents):
    z, q, g = draw(seed, 20, d, dtype=torch.float64)
    z, q = z * 10.0 ** exponents[0], q * 10.0 ** exponents[1]
    grad = gradient(TRICKS[name], z, q, g)
    assert_close((z * grad).sum(-1), (q * g).sum(-1), rtol=1e-9, atol=1e-9 * 10.0 ** exponents[1])
    assert_close(
        grad.norm(dim=-1) * z.norm(dim=-1), g.norm(dim=-1) * q.norm(dim=-1), rtol=1e-9, atol=0
    )


def test_agrees_with_an_independent_implementation():
    z, q, g = draw(0, 500, 16, dtype=torch.float64)
    theirs = torch.autograd.grad(rotate_to(z.requires_grad_(), q), z, g)[0]
    assert_close(gradient(rotation_trick, z, q, g), theirs, rtol=1e-9, atol=1e-9)


def test_a_reversed_rotation_would_be_noticed():
    "λR in place of λRᵀ is a real mistake; the angle tells them apart."
    z, q, g = draw(1, 200, 6, dtype=torch.float64)
    wrong = (
        explicit("rotation", q, z, g)
        * (q.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True)) ** 2
    )
    cosine = torch.nn.functional.cosine_similarity
    assert_close(cosine(z, gradient(rotation_trick, z, q, g)), cosine(q, g))
    assert (cosine(z, wrong) - cosine(q, g)).abs().median() > 0.1


@pytest.mark.parametrize("name", TRICKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "z, q",
    [
        ([0, 0], [1, 2]),
        ([1, 2], [0, 0]),
        ([0, 0], [0, 0]),
        ([1, 2], [-1, -2]),
        ([1, 2], [1, 2]),
        ([1, 2], [-2, -4]),
    ],
)
def test_degenerate_vectors_have_finite_gradients(name, dtype, z, q):
    z, q, g = (torch.tensor(v, dtype=dtype) for v in (z, q, [3, 4]))
    grad = gradient(TRICKS[name], z, q, g)
    assert grad.isfinite().all()
    if not (z.any() and q.any()):
        assert torch.equal(grad, g)
    else:
        assert_close(
            (z * grad).sum(),
            (q * g).sum() if name != "ste" else (z * g).sum(),
            rtol=2e-2,
            atol=1e-3,
        )


@pytest.mark.parametrize(
    "dtype, big, small",
    [(torch.float32, 1e30, 1e-38), (torch.float16, 6e4, 6e-8), (torch.bfloat16, 1e30, 1e-38)],
)
def test_norms_whose_squares_overflow_or_vanish(dtype, big, small):
    for size in (big, small):
        z, q, g = (torch.tensor(v, dtype=dtype) for v in ([size, 0.0], [0.0, size], [1.0, 2.0]))
        assert_close(
            gradient(rotation_trick, z, q, g),
            torch.tensor([2.0, -1.0], dtype=dtype),
            rtol=1e-2,
            atol=0,
        )


@pytest.mark.parametrize("trick, sign", [(rotation_trick, -1), (reflection_trick, 1)])
def test_parallel_up_to_rounding_is_parallel(trick, sign):
    "q = ±3.3 z rounds to another direction in the last bit; that bit must not become a mirror."
    z, _, g = draw(7, 1000, 8)
    q = sign * 3.3 * z
    expected = 3.3 * g
    if sign < 0:
        zh = z / z.norm(dim=-1, keepdim=True)
        expected = 3.3 * (g - 2 * zh * (zh * g).sum(-1, keepdim=True))
    assert_close(gradient(trick, z, q, g), expected, rtol=1e-4, atol=1e-4)


def test_nan_stays_in_its_row():
    z, q, g = draw(2, 5, 4)
    z[2, 1], q[3, 0] = math.nan, math.inf
    for trick in (rotation_trick, reflection_trick):
        grad = gradient(trick, z, q, g)
        assert (
            grad[[0, 1, 4]].isfinite().all()
            and not grad[2].isfinite().any()
            and not grad[3].isfinite().all()
        )


@pytest.mark.parametrize("name", TRICKS)
def test_layouts_devices_and_transforms(name):
    trick = TRICKS[name]
    z, q, g = draw(3, 6, 8, 5)
    expected = gradient(trick, z, q, g)
    swap = lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(gradient(trick, swap(z), swap(q), swap(g)), expected)
    compiled = torch.compile(trick, fullgraph=True, backend="aot_eager")
    assert_close(gradient(compiled, z, q, g), expected)
    pull = lambda z, q, g: torch.func.vjp(lambda z: trick(z, q), z)[1](g)[0]
    assert_close(torch.func.vmap(pull)(z, q, g), expected)
    meta = z.to("meta").requires_grad_()
    assert torch.autograd.grad(trick(meta, q.to("meta")), meta, g.to("meta"))[0].shape == z.shape
    with torch.autocast("cpu", torch.bfloat16):
        out = trick(z, q)
        assert out.dtype == torch.float32 and torch.equal(out, q)


@pytest.mark.parametrize("name", TRICKS)
@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(name, default):
    for d in (3, 16):
        z, q, g = draw(14, 50, d)
        expected, before = gradient(TRICKS[name], z, q, g), torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            assert torch.equal(gradient(TRICKS[name], z, q, g), expected)
        finally:
            torch.set_default_dtype(before)


@pytest.mark.parametrize("name", TRICKS)
@pytest.mark.parametrize(
    "z_dtype, q_dtype",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
)
def test_two_dtypes_meet_as_in_the_line_that_is_replaced(name, z_dtype, q_dtype):
    z, q, g = draw(16, 50, 8)
    z, q = z.to(z_dtype).requires_grad_(), q.to(q_dtype)
    out = TRICKS[name](z, q)
    replaced = z + (q - z).detach()
    assert out.dtype == replaced.dtype and torch.equal(out, q.to(out.dtype))
    (grad,) = torch.autograd.grad(out, z, g.to(out.dtype))
    assert grad.dtype == z_dtype
    error = relative_error(grad, explicit(name, z.detach(), q, g.to(out.dtype)))
    assert error.max() < 2 * torch.finfo(z_dtype).eps + 1e-5


@pytest.mark.parametrize("name", TRICKS)
def test_forward_mode(name):
    """Jacobian-vector products, the Jacobian column by column, the Hessian both ways round; q may
    have a tangent, which does not count."""
    z, q, _ = draw(17, 6, 3, dtype=torch.float64)
    J = torch.stack(
        [explicit(name, z, q, e.expand_as(q)) for e in torch.eye(3, dtype=torch.float64)], -2
    )  # rows eᵀJ = (λMᵀe)ᵀ
    tangent = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, out = torch.func.jvp(lambda z: TRICKS[name](z, q), (z,), (tangent,))
    assert torch.equal(value, q)
    assert_close(out, torch.einsum("nij,nj->ni", J, tangent))
    assert_close(torch.func.jvp(TRICKS[name], (z, q), (tangent, tangent))[1], out)
    assert_close(torch.func.vmap(torch.func.jacfwd(TRICKS[name]))(z, q), J)
    loss = lambda z, q: TRICKS[name](z, q).square().sum()
    by_rows = torch.autograd.functional.hessian(lambda z: loss(z, q[0]), z[0])
    assert_close(by_rows, 2 * J[0].T @ J[0])
    for hessian in (
        torch.func.hessian(loss)(z[0], q[0]),
        torch.func.jacrev(torch.func.jacfwd(loss))(z[0], q[0]),
        torch.func.jacfwd(torch.func.jacfwd(loss))(z[0], q[0]),
    ):
        assert_close(hessian, by_rows)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, tangent)
        assert_close(torch.autograd.forward_ad.unpack_dual(TRICKS[name](dual, q)).tangent, out)


def test_forward_mode_of_a_linear_map():
    z, q, t = draw(18, 5, 3, dtype=torch.float64)
    G = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, out = torch.func.jvp(lambda z: linear_estimator(z, q, G), (z,), (t,))
    assert torch.equal(value, q)
    assert_close(out, torch.einsum("nij,nj->ni", G, t))


@pytest.mark.parametrize("name", TRICKS)
def test_batched_gradients(name):
    z, q, _ = draw(15, 4, 3)
    jacobian = torch.autograd.functional.jacobian
    slow = jacobian(lambda z: TRICKS[name](z, q), z)
    assert_close(
        jacobian(lambda z: TRICKS[name](z, q), z, vectorize=True), slow, rtol=1e-5, atol=1e-6
    )
    assert_close(torch.func.jacrev(lambda z: TRICKS[name](z, q))(z), slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TRICKS)
def test_second_derivative_takes_the_map_as_constant(name):
    z, q, w = draw(4, 10, 3, dtype=torch.float64)
    z.requires_grad_()
    (first,) = torch.autograd.grad((TRICKS[name](z, q) ** 2).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first, z, w)
    M = torch.stack(
        [explicit(name, z.detach(), q, e.expand_as(q)) for e in torch.eye(3, dtype=torch.float64)],
        -1,
    )  # columns λMᵀe
    assert_close(second, 2 * torch.einsum("nij,nkj,nk->ni", M, M, w))


@pytest.mark.parametrize(
    "gamma", [0.5, torch.tensor(2.0), torch.arange(1.0, 11.0), list(range(1, 11))]
)
def test_gamma_scales_the_rotated_gradient(gamma):
    z, q, g = draw(5, 10, 3)
    lam = q.norm(dim=-1) / z.norm(dim=-1)
    scale = torch.as_tensor(gamma).expand(10)[:, None] / lam[:, None]
    for trick in (rotation_trick, reflection_trick):
        assert_close(gradient(trick, z, q, g, gamma=gamma), gradient(trick, z, q, g) * scale)


def test_gamma_is_not_rounded_to_half_precision():
    z, q, g = draw(16, 3, 4, dtype=torch.float16)
    assert gradient(rotation_trick, z, q, g * 1e-4, gamma=70000.0).isfinite().all()


def test_no_gradient_reaches_q_or_the_matrix():
    z, q, _ = draw(6, 4, 3)
    G = torch.eye(3).requires_grad_()
    q.requires_grad_()
    for out in (*(t(z.requires_grad_(), q) for t in TRICKS.values()), linear_estimator(z, q, G)):
        assert torch.autograd.grad(out.sum(), [q, G], allow_unused=True) == (None, None)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", TRICKS)
def test_the_value_may_be_changed_in_place(name, compiled):
    "As that of `z + (q - z).detach()`; also under `no_grad`, where it could be `q` itself."

    def step(z, q):
        out = TRICKS[name](z, q)
        out += 1
        return torch.nn.functional.relu(out, inplace=True)

    call = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
    z, q, g = draw(13, 6, 4)
    z.requires_grad_()
    before = q.clone()
    out = call(z, q)
    (grad,) = torch.autograd.grad(out, z, g)
    assert_close(grad, gradient(TRICKS[name], z, q, torch.where(q + 1 > 0, g, 0)))
    with torch.no_grad():
        call(z, q)
    assert torch.equal(q, before) and TRICKS[name](z, q).data_ptr() != q.data_ptr()


@pytest.mark.parametrize("name", TRICKS)
def test_vectors_along_another_dimension(name):
    z, q, g = torch.randn(
        3, 2, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    z.requires_grad_()
    for dim in (0, 1, 2, 3, -1, -2, -3):
        out = TRICKS[name](z, q, dim=dim)
        last = TRICKS[name](z.movedim(dim, -1), q.movedim(dim, -1))
        assert torch.equal(out, q)
        assert_close(
            torch.autograd.grad(out, z, g)[0], torch.autograd.grad(last, z, g.movedim(dim, -1))[0]
        )
    gamma = torch.rand(2, 4, 5, dtype=torch.float64)
    if name in ("rotation", "reflection"):
        (a,) = torch.autograd.grad(TRICKS[name](z, q, gamma, dim=1), z, g)
        (b,) = torch.autograd.grad(TRICKS[name](z, q, 1.0, dim=1), z, g)
        assert_close(a, gamma[:, None] * b)
    G = torch.randn(6, 6, dtype=torch.float64)
    assert_close(
        torch.autograd.grad(linear_estimator(z, q, G, dim=1), z, g)[0],
        torch.einsum("ij,bitu->bjtu", G, g),
    )
    with pytest.raises(IndexError):
        TRICKS[name](z, q, dim=4)


@pytest.mark.slow
def test_a_bare_estimator_says_once_a_process_that_lambda_is_far_from_1():
    program = """
import sys, warnings
import torch
from rotvq import rotation_trick, reflection_trick, straight_through, VectorQuantizer
z, q = torch.randn(2, 50, 8)
def said(function, times):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(times): function()
    return [w for w in found if "median of λ" in str(w.message)]
assert not said(lambda: rotation_trick(z, q, gamma=1.0), 20)
assert not said(lambda: straight_through(z, 60 * q), 20)
assert not said(lambda: torch.func.vmap(rotation_trick)(z[None], 60 * q[None]), 20)
compiled = torch.compile(lambda: rotation_trick(z, 60 * q), backend="eager", fullgraph=True)
assert not said(compiled, 20)
assert not said(lambda: rotation_trick(z, 60 * q), 9)
found = said(lambda: reflection_trick(z, 60 * q), 1)
assert len(found) == 1 and "call 10" in str(found[0].message), found
assert found[0].filename == "<string>", found
assert not said(lambda: rotation_trick(z, 60 * q), 30)
layer = VectorQuantizer(8, 32, learnable=True, init="normal")
layer.codebook.data.mul_(60)
assert "training batch 10" in str(said(lambda: layer(z), 30)[0].message)   # which looks by itself
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_learnable_codebook_keeps_its_own_gradient():
    "q may come from a parameter and be used beside the estimator, as in the codebook loss."
    gen = torch.Generator().manual_seed(0)
    codebook, z = (
        torch.randn(5, 3, generator=gen).requires_grad_(),
        torch.randn(7, 3, generator=gen).requires_grad_(),
    )
    q = codebook[torch.arange(7) % 5]
    for trick in TRICKS.values():
        loss = (q - z.detach()).square().sum()
        (alone,) = torch.autograd.grad(loss, codebook, retain_graph=True)
        (both,) = torch.autograd.grad(loss + trick(z, q).sin().sum(), codebook, retain_graph=True)
        assert torch.equal(alone, both)


@pytest.mark.parametrize("name", TRICKS)
def test_bad_input_names_both_operands(name):
    trick = TRICKS[name]
    for z, q, error, words in [
        (torch.zeros(2, 3), torch.zeros(3), ValueError, [r"\(2, 3\)", r"\(3,\)"]),
        (torch.zeros(()), torch.zeros(()), ValueError, ["d ≥ 1"]),
        (
            torch.zeros(2, 3),
            torch.zeros(2, 3, dtype=torch.int64),
            TypeError,
            ["float32", "int64", "floating"],
        ),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(2, 3, dtype=torch.int64),
            TypeError,
            ["int64"],
        ),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), ValueError, ["cpu", "meta"]),
    ]:
        for word in words:
            with pytest.raises(error, match=word):
                trick(z, q)


@pytest.mark.parametrize("trick", [rotation_trick, reflection_trick])
def test_a_gamma_that_does_not_fit_is_refused(trick):
    for gamma in (torch.ones(7), [1.0] * 7):
        with pytest.raises(ValueError, match=r"\(7,\).*\(2,\)"):
            trick(torch.zeros(2, 3), torch.zeros(2, 3), gamma=gamma)
