"""Triton's interpreter in the place of a GPU: kernels become what a CPU computes."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]  # the helpers of the other tests

import pytest
from hypothesis import settings

import interpreter

settings.register_profile("interpreter", deadline=None, max_examples=4, derandomize=True)


@pytest.fixture(scope="session", autouse=True)
def kernels_on_the_cpu(request):
    interpreter.kernels_on_the_cpu()
    settings.load_profile("interpreter")
    yield
    if request.config.option.keyword == "":
        assert min(interpreter.used.values()) > 0  # all tests ran
