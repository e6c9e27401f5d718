"""The ledger of claims against the notebooks and tests: every check that it names exists and can
fail."""

import ast
import json
import re

import pytest

from helpers import NOTEBOOKS, ROOT, place

pytestmark = pytest.mark.slow

PAGE = (ROOT / "nbs" / "claims.qmd").read_text(encoding="utf-8")
IDS = [
    f"{letter}{k}"
    for letter, count in {"V": 8, "S": 6, "H": 4, "R": 11, "F": 3, "G": 6, "P": 6}.items()
    for k in range(1, count + 1)
]
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if re.match(r"\| [A-Z]\d", line)
    for cells in [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]]
}


def notebook(name):
    return json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))["cells"]


def labelled() -> dict[str, tuple[str, str]]:
    "Label of each checking cell -> its notebook and source."
    found = {}
    for file in map(place, NOTEBOOKS):
        for cell in notebook(file):
            source = "".join(cell["source"])
            for label in re.findall(r"^#\| label: (check-\S+)$", source, re.MULTILINE):
                assert cell["cell_type"] == "code" and label not in found, label
                found[label] = (file, source)
    return found


def can_fail(tree: ast.AST) -> bool:
    calls = [
        getattr(n.func, "id", getattr(n.func, "attr", ""))
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
    ]
    says = [
        n.test
        for n in ast.walk(tree)
        if isinstance(n, ast.Assert) and not isinstance(n.test, ast.Constant)
    ]
    trivial = [
        t
        for t in says
        if isinstance(t, ast.Compare) and ast.dump(t.left) == ast.dump(t.comparators[0])
    ]
    return "assert_close" in calls or "raises" in calls or len(says) > len(trivial)


def slug(heading: str) -> str:
    "The anchor that Pandoc gives a heading."
    text = re.sub(r"[$`*\\]", "", heading).strip().lower()
    return re.sub(r"^[^a-zα-ω]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", text)))


def test_every_claim_has_one_row():
    assert list(ROWS) == IDS
    assert all(len(row) == 5 for row in ROWS.values())


@pytest.mark.parametrize("claim", IDS)
def test_row(claim):
    text, place, checks, verdict, evidence = ROWS[claim]
    cells, named = labelled(), re.findall(r"`([^`]+)`", checks)
    assert text and re.match(r"(holds|does not hold|open)\b", verdict)
    # what is no proof says on how much it rests, and what would overturn it
    assert evidence == "proof" or re.match(r"(proof; )?(live|recorded)\b.*: \w", evidence), evidence
    if not verdict.startswith("open"):
        assert named, "a verdict without a check"
    for name in named:
        if name.startswith("check-"):
            file, source = cells[name]
            assert f"]({file}" in place, f"{name} is in {file}, which the row does not name"
            assert f"[`{name}`]({file}#{name})" in checks, f"{name} is no link to its cell"
            assert "eval: false" not in source and can_fail(ast.parse(source)), (
                f"{name} cannot fail"
            )
        else:
            file, function = name.split("::")
            body = [
                n
                for n in ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
                if getattr(n, "name", "") == function
            ]
            assert body and can_fail(body[0]), name
    for file, anchor in re.findall(r"\]\(([\w/]+\.ipynb)(?:#([^)]+))?\)", place):
        assert (ROOT / "nbs" / file).exists()
        if not anchor:
            continue
        headings = [
            slug(h)
            for c in notebook(file)
            if c["cell_type"] == "markdown"
            for h in re.findall(r"^#+ (.+)$", "".join(c["source"]), re.MULTILINE)
        ]
        assert anchor in headings, (anchor, headings)


def test_summary_counts_the_verdicts():
    def kind(verdict):
        if verdict.startswith(("open", "does not hold")):
            return verdict[:4]
        return (
            "conditions"
            if verdict.startswith("holds under") or "does not hold" in verdict
            else "holds"
        )

    kinds = [kind(row[3]) for row in ROWS.values()]
    said = re.search(
        r"Of (\d+) claims (\d+) hold, (\d+) hold under conditions that the verdict names, (\d+)"
        r" does not hold, and none is open",
        PAGE,
    )
    assert [int(x) for x in said.groups()] == [
        len(ROWS),
        *(kinds.count(k) for k in ("holds", "conditions", "does")),
    ]
    assert "open" not in kinds


def test_every_check_is_on_the_page():
    missing = set(labelled()) - set(re.findall(r"`(check-[^`]+)`", PAGE))
    no_claims_of_a_source = {
        "check-transpose",
        "check-normal",
        "check-missing-lambda",
        "check-normalized-twice",
        "check-proposals",
        "check-bench",
        "check-pile",
        "check-decoder-scale",
        "check-swing",
        "check-lookup",
        "check-running-average",
        "check-copied",
        "check-turned",
        "check-two-forces",
        "check-expected",
        "check-late-costs",
        "check-fill",
        "check-revive",
        "check-rule",
        "check-straight",
        "check-setups",
        "check-larger",
        "check-forces",
        "check-late",
        "check-clouds",
        "check-parts",
        "check-same-sequence",
        "check-larger-beta",
        "check-codes-move",
        "check-sampled",
        "check-commitment",
        "check-decay",
        "check-residual-levels",
        "check-nothing-before",
        "check-optimizers",
        "check-better-start",
        "check-three-lines",
        "check-lanes",
        "check-on-a-gpu",
        "check-weight",
        "check-skip",
        "check-drift",
        "check-half",
        "check-cloud",
        "check-rivals",
        "check-weights",
        "check-dac",
        "check-residual-jacobian",
        "check-residual-reaches",
        "check-fewer-levels",
        "check-heads",
        "check-simvq-layer",
        "check-all-move",
    }
    assert not missing - no_claims_of_a_source, missing
