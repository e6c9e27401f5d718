"""Each check of a claim fails when the code, or the formula that it states, is wrong in the way the
claim excludes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")]

# of the definitions in the book
ARGMAX = "return scores.argmax(-1)"
STRAIGHT = "return q.detach() + (z - z.detach())"
DOUBLED = STRAIGHT, "return q.detach() + 2 * (z - z.detach())"
TURNED = "turned = rotate(z, a, b) * (lam if gamma is None else gamma)"
WAY_BACK = TURNED, TURNED.replace("z, a, b", "z, b, a")  # Rᵀ → R
UNSCALED = TURNED, TURNED.replace("(lam if", "(1 if")
COPIED = TURNED, "turned = z"
MIRRORED = "reflect(z, unit(a) - unit(b))"
TWO_MIRRORS = MIRRORED, "reflect(reflect(z, unit(a) + unit(b)), b)"
# of the forms in the machine room
STE = "return g, None", "return 2 * g, None"
BACKWARD = "return pull(g, z, q, gamma, ctx.mirror, weight)"
IDENTITY = BACKWARD, "return g"  # the trick copies the gradient
TRANSPOSED = BACKWARD, "return pushforward(g, z, q, gamma, weight, ctx.mirror)"  # Rᵀ → R
SCALE = 'expand(gamma, "gamma", z), expand(weight'
NO_LAMBDA = SCALE, 'expand(1.0 if gamma is None else gamma, "gamma", z), expand(weight'
INVERSE = (
    SCALE,
    'expand(1 / length_ratio(z, q) if gamma is None else gamma, "gamma", z), expand(weight',
)
ROTATE = "return u - 2 * r * along(r) + 2 * b * along(a)"
BACK = ROTATE, "return u - 2 * r * along(r) + 2 * a * along(b)"  # from b to a
HALF_TURN = ROTATE, "return 2 * r * along(r) - u"  # a to b by half a turn
ONE_MIRROR = (
    "return householder_matrix(b) @ householder_matrix(unit(a) + unit(b))",
    "return householder_matrix(unit(a) - unit(b))",
)
FARTHEST = "codes.T).argmax(1) for x in parts", "codes.T).argmin(1) for x in parts"
HIGHEST = (
    "torch.addmm(offset, x, codes.T).argmax(1) for",
    "len(codes) - 1 - torch.addmm(offset, x, codes.T).flip(1).argmax(1) for",
)
DECAY = "running), 1 - decay)", "running), decay)"
HALF_MIRROR = "return u - 2 * v * (v * u)", "return u - v * (v * u)"

# claim, its check, what is changed: (text, in its place)
MUTATIONS = {
    "V1: a bound without the prior": ("check-v1", "r * p.log()", "0 * p.log()"),
    "V2: the farthest code": ("check-v2", ARGMAX, "return scores.argmin(-1)"),
    "V2: ties to the highest index": (
        "check-v2",
        ARGMAX,
        "return len(codebook) - 1 - scores.flip(-1).argmax(-1)",
    ),
    "V2: offset without its half": ("check-v2", "- 0.5 * codebook.square()", "- codebook.square()"),
    "lookup: the farthest code": ("check-lookup", *FARTHEST),
    "lookup: ties to the highest index": ("check-lookup", *HIGHEST),
    "lookup: offset without its half": (
        "check-lookup",
        "offset = -0.5 * directions",
        "offset = -directions",
    ),
    "V3: a prior that is not uniform": (
        "check-v3",
        "(log_r + logK)",
        "(log_r + codes[:, 0].softmax(0).log().neg())",
    ),
    "V4: codebook loss without its stop": (
        "check-v4",
        "(z.detach() - q).square()",
        "(z - q).square()",
    ),
    "V4: β on the wrong term": ("check-v4", "beta * (z - q.detach())", "beta * (z.detach() - q)"),
    "V5: symbols of reconstructions for uniform ones": (
        "check-v5",
        "for name, pictures in sets.items()}",
        'for name, pictures in (sets | {"uniform symbols": sets["reconstructions"]}).items()}',
    ),
    "V6: a step twice as long": (
        "check-v6",
        "grad / (2 * torch.bincount",
        "grad / (torch.bincount",
    ),
    "V7: decay inverted": (
        "check-v7",
        "counts.lerp_(batch[:, -1], 1 - decay)",
        "counts.lerp_(batch[:, -1], decay)",
    ),
    "V7: counts not smoothed": (
        "check-v7",
        "(counts + eps) / (counts.sum() + len(counts) * eps) * counts.sum()",
        "counts + 0 * eps",
    ),
    "V7: sums that do not follow": (
        "check-v7-fixed-point",
        "sums.lerp_(batch[:, :-1], 1 - decay)",
        "sums.lerp_(batch[:, :-1], 0.0)",
    ),
    "running average: decay inverted": ("check-running-average", *DECAY),
    "running average: counts not smoothed": (
        "check-running-average",
        "(N + eps) / (N.sum() + len(N) * eps) * N.sum()",
        "N + 0 * eps",
    ),
    "running average: a bad batch is learned from": (
        "check-running-average",
        "return batch.sum().isfinite() & (batch[:, -1].sum() > 0)",
        "return batch.sum() == batch.sum()",
    ),
    "V8: another code is decoded": (
        "check-v8",
        "self.book()[indices.clamp_min(0)]",
        "self.book().roll(1, 0)[indices.clamp_min(0)]",
    ),
    "S1: a lookup that depends on every digit": (
        "check-s1",
        "scores = z @ codebook.T",
        "scores = 3 * (1e7 * z).sin() @ codebook.T",
    ),
    "S2: gradient doubled": ("check-s2", *DOUBLED),
    "S2: value z": ("check-s2", STRAIGHT, "return z + 0 * q.detach()"),
    "S3: a gradient of its own for each z": (
        "check-s3",
        STRAIGHT,
        "return q.detach() + torch.rand_like(z) * (z - z.detach())",
    ),
    "S4: another matrix in the gap": ("check-s4", *DOUBLED),
    "S5: the matrix not transposed": ("check-s5", '"...ij,...j->...i"', '"...ji,...j->...i"'),
    "copied: gradient doubled": ("check-copied", *STE),
    "copied: value z": ("check-copied", "return q.clone()", "return z.clone()"),
    "copied: the matrix not transposed": (
        "check-copied",
        '"...ij,...i->...j"',
        '"...ij,...j->...i"',
    ),
    "S6: a matrix that misses q": (
        "check-s6",
        "z_.square().sum(-1)[:, None, None]",
        "z_.norm(dim=-1)[:, None, None]",
    ),
    "H1: a projection": ("check-h1", *HALF_MIRROR),
    "H2: a projection": ("check-h2", "- 2 * v[..., :, None]", "- v[..., :, None]"),
    "H3: sign of the normal": (
        "check-h3",
        "half = (unit(a) + unit(b)) / 2",
        "half = (unit(a) - unit(b)) / 2",
    ),
    "H4: one mirror": ("check-h4", "R = householder_matrix(n2) @", "R ="),
    "R1: one mirror": ("check-r1", *ONE_MIRROR),
    "R2: the way back": ("check-r2", *BACK),
    "R3: a matrix in between": (
        "check-r3",
        "e - 2 * (e @ column(rh)) @ row(rh)",
        "e - 2 * e @ (column(rh) @ row(rh))",
    ),
    "R4: half a turn": ("check-r4", *HALF_TURN),
    "R5: value z": (
        "check-r5",
        "return b + (turned - turned.detach())",
        "return a + (turned - turned.detach())",
    ),
    "R6: λ left out": ("check-r5", *UNSCALED),
    "R6: not transposed": ("check-r5", *WAY_BACK),
    "turned: λ left out": ("check-turned", *NO_LAMBDA),
    "turned: not transposed": ("check-turned", *TRANSPOSED),
    "turned: copied": ("check-turned", *IDENTITY),
    "turned: two mirrors for one": ("check-turned", "mirror=True", "mirror=False"),
    "turned: value z": ("check-turned", "return q.clone()", "return z.clone()"),
    "R6: by hand, not transposed": ("check-r6", "+ 2 * zh * dot(qh, g)", "+ 2 * qh * dot(zh, g)"),
    "R7: not transposed": ("check-r7-r8", *WAY_BACK),
    "R7: copied": ("check-r7-r8", *COPIED),
    "R8: λ left out": ("check-r7-r8", *UNSCALED),
    "R9: half a turn": ("check-r9", *HALF_TURN),
    "R10: copied": ("check-r10", *COPIED),
    "R11: a step along the gradient": ("check-r11", "points - rate * grad", "points + rate * grad"),
    "R11: not transposed": ("check-r11", *WAY_BACK),
    "F1: two mirrors": ("check-f1", *TWO_MIRRORS),
    "F2: two mirrors": ("check-f2", *TWO_MIRRORS),
    "F2: one mirror for the rotation": (
        "check-f2-angle",
        "turned = rotate(z, a, b)",
        "turned = (householder_matrix(unit(a) - unit(b)) @ z[..., None])[..., 0]",
    ),
    "G1: the scale is not heard": ("check-g1", SCALE, "None, expand(weight"),
    "G2: λ upside down": (
        "check-g2",
        "(q.norm(dim=-1) / z.detach().norm(dim=-1))",
        "(z.detach().norm(dim=-1) / q.norm(dim=-1))",
    ),
    "G3: λ left out": ("check-balance", *NO_LAMBDA),
    "G4: running averages that stay": ("check-lambda-at-the-start", *DECAY[:1], "running), 0.0)"),
    "G5: copied": ("check-g5", *IDENTITY),
    "G6: λ where it should be 1": (
        "check-g6",
        SCALE,
        'expand(2 * length_ratio(z, q) if gamma is None else gamma, "gamma", z), expand(weight',
    ),
    "P1: the trick copies": (
        "check-toy",
        '"rotation": (True, False)',
        '"rotation": (False, False)',
    ),
    "P5: a third halving": ("check-p5", "nn.Conv2d(a, b, 4, 2, 1)", "nn.Conv2d(a, b, 4, 4)"),
    "P6: the way back": (
        "check-p6",
        "2 * e @ zh[..., None] @ qh[:, None]",
        "2 * e @ qh[..., None] @ zh[:, None]",
    ),
    "why: a copied gradient swings": ("check-swing", *IDENTITY),
    "why: sums that do not shrink": (
        "check-pile",
        "running.lerp_(torch.where(good, new.to(running.dtype), running), 1 - decay)",
        "running.copy_(torch.where(new > 0, new.to(running.dtype), running))",
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    "Of every check on the code as it is, and of every mutation."
    checks = dict.fromkeys(mutation[0] for mutation in MUTATIONS.values())
    # check-toy trains for half a minute, and passes in its notebook
    jobs = [{"name": name, "check": name} for name in checks if name != "check-toy"]
    jobs += [
        {"name": name, "check": check, "old": old, "new": new}
        for name, (check, old, new) in MUTATIONS.items()
    ]
    file = tmp_path_factory.mktemp("mutations") / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, FOLDER / "mutate.py", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {job["name"]: job["outcome"] for job in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_check_catches(name, outcomes):
    assert (
        outcomes.get(MUTATIONS[name][0], "passes") == "passes"
    )  # by the same way, on the code as it is
    assert outcomes[name] == "caught"
