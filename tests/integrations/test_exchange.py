"""Quantizers of models of transformers and of encodec, as they begin, converted to ours and back:
indices equal, values to 1e-6."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "exchange.py"
spec = importlib.util.spec_from_file_location("exchange", SCRIPT)
exchange = importlib.util.module_from_spec(spec)
spec.loader.exec_module(exchange)
NAMES = [
    name for name, (library, _) in exchange.PEERS.items() if library in ("transformers", "encodec")
]


@pytest.mark.parametrize("name", NAMES)
def test_states_go_there_and_back(name, record_property):
    found = exchange.compared(name)
    record_property("largest difference", found)
    print(name, found)
    assert found["indices"] == 1600 and found["values"] <= 1e-6 and found["back"] <= 1e-6


def test_a_codec_of_transformers_trains_with_our_stack_in_it():
    import torch

    x = torch.randn(64, 1, exchange.LENGTH).cumsum(-1) / 10
    exchange.STEPS = exchange.EVERY = 4
    for way in exchange.WAYS:
        row = exchange.trained(way, 0, x, x)
        assert (
            len(row["mse_by_level"]) == len(row["usage_by_level"]) == exchange.LEVELS
            and row["mse"][-1] < 10
        )
