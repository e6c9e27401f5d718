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
    "learning",
    "quantizer",
    "layout",
    "surroundings",
    "convert",
    "model",
    "names",
    "relatives",
    "residual",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mypy") is None, reason="mypy is a tool of development"
    ),
]


def mypy(*arguments, cache) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--follow-imports=silent",
            f"--cache-dir={cache}",
            *map(str, arguments),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr if done.returncode else ""


def test_users_get_the_types_that_they_expect(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import torch, rotvq\nq: int = rotvq.VectorQuantizer(2, 3)(torch.zeros(2)).q\n"
    )
    said = mypy("--strict", "tests/typing/usage.py", wrong, cache=tmp_path).splitlines()
    assert len(said) == 2 and "wrong.py:2" in said[0] and "Incompatible types" in said[0], said


def test_the_modules_of_the_public_api_are_clean(tmp_path):
    assert not mypy(*(f"rotvq/{name}.py" for name in PUBLIC), cache=tmp_path)


def test_the_types_are_installed():
    assert (ROOT / "rotvq" / "py.typed").exists() and "py.typed" in (ROOT / "setup.py").read_text()
