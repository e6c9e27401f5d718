"""The examples in docstrings run, and give what they say."""
import doctest
import importlib

import pytest
import torch

import rotvq

EXAMPLES = {"codebook": "nearest_code", "ste": "straight_through", "rotation": "rotation_trick", "quantizer": "VectorQuantizer", "model": "VQVAE"}


@pytest.mark.parametrize("module", EXAMPLES)
def test_the_example_of(module):
    torch.manual_seed(0)
    held = importlib.import_module(f"rotvq.{module}")
    found = {test.name: test for test in doctest.DocTestFinder(recurse=True).find(held, extraglobs={"torch": torch})}
    test = found[f"rotvq.{module}.{EXAMPLES[module]}"]
    assert test.examples and getattr(rotvq, EXAMPLES[module])
    assert doctest.DocTestRunner().run(test).failed == 0
