"""A saved model: its folder, older layouts, and the Hugging Face Hub's."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rotvq import VQVAE
from rotvq.model import read_config


def saved(folder, **about):
    torch.manual_seed(0)
    model = VQVAE(16, 8, 32, estimator="ste", decay=0.9).eval()
    model.save_pretrained(folder, **about)
    return model


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_config_json_holds_the_arguments_and_run_json_the_rest(tmp_path):
    model = saved(tmp_path, run={"seed": 3})
    assert json.loads((tmp_path / "config.json").read_text()) == model.config
    assert read_config(tmp_path) == {"model": model.config, "run": {"seed": 3}}
    assert same(VQVAE.from_pretrained(tmp_path), model)


def test_a_name_of_the_hub_is_fetched(tmp_path, monkeypatch):
    model, asked = saved(tmp_path), []
    def snapshot_download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert same(VQVAE.from_pretrained("somebody/a-model"), model) and asked[0][0] == "somebody/a-model" and "model.safetensors" in asked[0][1]


def test_without_the_hub_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"): VQVAE.from_pretrained("somebody/a-model")


@pytest.mark.parametrize("name", ["runs/typo", "./typo", "../typo", "models/typo"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=lambda *a, **k: pytest.fail("asked")))
    with pytest.raises(FileNotFoundError, match="typo"): VQVAE.from_pretrained(name)


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = saved(tmp_path / "somebody" / "model")
    assert same(VQVAE.from_pretrained("somebody/model"), model)


def test_the_mixin_of_the_hub_reads_the_folder(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    class OnHub(VQVAE, hub.PyTorchModelHubMixin):
        def __init__(self, **arguments): VQVAE.__init__(self, **arguments)
    OnHub.from_pretrained = classmethod(hub.PyTorchModelHubMixin.from_pretrained.__func__)     # VQVAE has one of that name
    saved(tmp_path)
    assert same(OnHub.from_pretrained(str(tmp_path)), VQVAE.from_pretrained(tmp_path))
