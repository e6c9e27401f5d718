"""The public API under a type checker, as users of one see it, and the modules that define it."""

import importlib.util
import subprocess
import sys

import pytest

from helpers import ROOT

PUBLIC = [
    "codebook",
    "ste",
    "householder",
    "rotation",
    "reflection",
    "layer/learning",
    "layer/quantizer",
    "layer/layout",
    "layer/surroundings",
    "layer/exchange",
    "run/model",
    "layer/names",
    "layer/relatives",
    "layer/residual",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mypy") is None, reason="mypy is a tool of development"
    ),
]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[str]:
    "What mypy says of the use, of a wrong one, and of the modules; once, for it reads torch."
    place = tmp_path_factory.mktemp("mypy")
    wrong = place / "wrong.py"
    wrong.write_text(
        "import torch, rotvq\nq: int = rotvq.VectorQuantizer(2, 3)(torch.zeros(2)).q\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "tests/typing/mypy.ini"]
    command += [f"--cache-dir={place}", "tests/typing/usage.py", str(wrong)]
    command += [f"rotvq/{name}.py" for name in PUBLIC]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (done.stdout + done.stderr).splitlines()


def test_users_get_the_types_that_they_expect(said):
    assert any("wrong.py:2" in line and "Incompatible types" in line for line in said), said
    assert not [line for line in said if line.startswith("tests/typing/")]


def test_the_modules_of_the_public_api_are_clean(said):
    assert f"(checked {len(PUBLIC) + 2} source files)" in said[-1], said
    assert not [line for line in said if line.startswith("rotvq/")]


def test_the_types_are_installed():
    assert (ROOT / "rotvq" / "py.typed").exists() and "py.typed" in (ROOT / "setup.py").read_text()
