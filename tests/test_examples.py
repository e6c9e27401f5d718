"""The examples in docstrings run, and give what they say."""

import doctest
import importlib
import json
from pathlib import Path

import pytest
import torch

import rotvq

EXAMPLES = {
    "codebook": "nearest_code",
    "ste": "straight_through",
    "rotation": "rotation_trick",
    "quantizer": "VectorQuantizer",
    "model": "VQVAE",
}
MORE = {"residual": ("ResidualVQ", "ProductVQ"), "relatives": ("FSQ", "SimVQ")}
EXAMPLES = [
    *EXAMPLES.items(),
    *((module, name) for module, names in MORE.items() for name in names),
]
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("module, name", EXAMPLES)
def test_the_example_of(module, name):
    torch.manual_seed(0)
    held = importlib.import_module(f"rotvq.{module}")
    found = {
        test.name: test
        for test in doctest.DocTestFinder(recurse=True).find(held, extraglobs={"torch": torch})
    }
    test = found[f"rotvq.{module}.{name}"]
    assert test.examples and getattr(rotvq, name)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_quantizer_that_the_recipe_shows_is_the_one_that_was_measured():
    source = (ROOT / "benchmarks" / "exchange.py").read_text(encoding="utf-8")
    shown = source[source.index("class Quantizer(") : source.index("def signals(")].strip()
    cells = json.loads((ROOT / "nbs" / "20_tokenizer.ipynb").read_text(encoding="utf-8"))["cells"]
    assert any(shown in "".join(cell["source"]) for cell in cells)
