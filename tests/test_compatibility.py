"""The page on compatibility against the tests: every row names tests that exist and can fail, and
the versions are those of settings.ini."""

import ast
import re

import pytest

from helpers import ROOT
from test_claims import can_fail
from test_project import settings

pytestmark = pytest.mark.slow

PAGE = (ROOT / "nbs" / "compatibility.qmd").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| what", "| | "))
]
TESTED = [
    row
    for row in ROWS
    if len(row) == 3 and "`make" not in row[1] and not re.match(r"[\d.]+$", row[1])
]


def functions(file: str) -> dict:
    return {
        n.name: n
        for n in ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
        if isinstance(n, ast.FunctionDef)
    }


def helpers_that_can_fail(file: str) -> set:
    return {name for name, node in functions(file).items() if can_fail(node)}


@pytest.mark.parametrize("row", TESTED, ids=lambda row: row[0][:60])
def test_row(row):
    what, verdict, checks = row
    named = re.findall(r"`([^`]+)`", checks)
    assert named or checks == "the same" or verdict == "not tried", "a verdict without a test"
    assert re.search(
        r"\b(right|refused|unsupported|unchanged|load|converted|two graphs|begin again|not tried|no"
        r" spills)\b",
        verdict,
    )
    for name in named:
        file, function = name.split("::")
        node = functions(file)[function]
        called = {
            n.func.id
            for n in ast.walk(node)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert can_fail(node) or called & helpers_that_can_fail(file), name


def test_every_test_of_the_surroundings_is_on_the_page():
    for file in (
        "test_compiled.py",
        "test_export.py",
        "test_parallel.py",
        "integrations/test_onnx.py",
        "integrations/test_frameworks.py",
    ):
        for name in functions(file):
            if name.startswith("test_") and name != "test_the_model_of_the_run":
                assert f"`{file}::{name}`" in PAGE, name


def test_the_oldest_versions_are_those_of_the_settings():
    oldest = dict(re.findall(r"([\w-]+)>=([\d.]+)", settings()["requirements"]))
    listed = {row[0]: row[1] for row in ROWS if len(row) == 3 and re.match(r"[\d.]+$", row[1])}
    assert listed == oldest
