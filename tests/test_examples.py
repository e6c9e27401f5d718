"""The examples in docstrings run, and give what they say."""

import ast
import doctest
import importlib
import json
import re

import pytest
import torch

import rotvq
from helpers import ROOT

HELD = {
    "layer.lookup": ("nearest_code",),
    "layer.gradients": ("straight_through", "rotation_trick"),
    "layer.quantizer": ("VectorQuantizer",),
    "run.model": ("VQVAE",),
    "layer.residual": ("ResidualVQ", "ProductVQ"),
    "layer.relatives": ("FSQ", "SimVQ"),
}
EXAMPLES = [(module, name) for module, names in HELD.items() for name in names]


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


@pytest.mark.slow
def test_the_quantizer_that_the_recipe_shows_is_the_one_that_was_measured():
    source = (ROOT / "benchmarks" / "exchange.py").read_text(encoding="utf-8")
    shown = source[source.index("class Quantizer(") : source.index("def signals(")].strip()
    cells = json.loads((ROOT / "nbs" / "book" / "09_tokenizer.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    blocks = map(ast.parse, re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    recipe = {ast.dump(node) for block in blocks for node in block.body}
    assert {ast.dump(node) for node in ast.parse(shown).body} <= recipe
