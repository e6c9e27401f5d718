"""A saved model: its folder, older layouts, and the Hugging Face Hub's."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rotvq.run.model
from helpers import contents
from rotvq import VQVAE
from rotvq.run.model import read_config


def saved(folder, **about):
    torch.manual_seed(0)
    model = VQVAE(16, 8, 32, estimator="ste", decay=0.9).eval()
    model.save_pretrained(folder, **about)
    return model


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


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

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download)
    )
    assert (
        same(VQVAE.from_pretrained("somebody/a-model"), model)
        and asked[0][0] == "somebody/a-model"
        and "model.safetensors" in asked[0][1]
    )


def test_without_the_hub_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        VQVAE.from_pretrained("somebody/a-model")


@pytest.mark.parametrize("name", ["runs/typo", "./typo", "../typo", "models/typo"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    monkeypatch.setitem(
        sys.modules,
        "huggingface_hub",
        SimpleNamespace(snapshot_download=lambda *a, **k: pytest.fail("asked")),
    )
    with pytest.raises(FileNotFoundError, match="typo"):
        VQVAE.from_pretrained(name)


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = saved(tmp_path / "somebody" / "model")
    assert same(VQVAE.from_pretrained("somebody/model"), model)


@pytest.mark.slow
def test_the_mixin_of_the_hub_reads_the_folder(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class OnHub(VQVAE, hub.PyTorchModelHubMixin):
        def __init__(self, **arguments):
            VQVAE.__init__(self, **arguments)

    OnHub.from_pretrained = classmethod(
        hub.PyTorchModelHubMixin.from_pretrained.__func__
    )  # VQVAE has one of that name
    saved(tmp_path)
    assert same(OnHub.from_pretrained(str(tmp_path)), VQVAE.from_pretrained(tmp_path))


# What cannot be saved, and what is saved all the same


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 0},
        {"dim": -1},
        {"codebook_size": 0},
        {"downsamples": 0},
        {"blocks": -1},
        {"width": 2.5},
        {"dim": "8"},
        {"blocks": True},
    ],
    ids=str,
)
def test_numbers_that_make_no_model_are_named(changes):
    name, value = *changes, *changes.values()
    with pytest.raises((ValueError, TypeError), match=f"{name} = {value!r}"):
        VQVAE(**{"width": 16, "dim": 8, "codebook_size": 32} | changes)


@pytest.mark.parametrize(
    "number", [np.int64, np.int32, torch.tensor], ids=["int64", "int32", "tensor"]
)
def test_numbers_of_numpy_and_tensors_are_saved_as_numbers(tmp_path, number):
    model = VQVAE(width=number(16), dim=number(8), codebook_size=number(32), decay=np.float32(0.5))
    model.save_pretrained(
        tmp_path, run={"mse": np.float32(0.25), "usage": torch.tensor(0.5), "epochs": number(3)}
    )
    assert json.loads((tmp_path / "config.json").read_text())["width"] == 16
    assert json.loads((tmp_path / "run.json").read_text())["run"] == {
        "mse": 0.25,
        "usage": 0.5,
        "epochs": 3,
    }
    assert same(VQVAE.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "about", [{"x": object()}, {"x": np.zeros(3)}, {"x": {1, 2}}], ids=["object", "array", "set"]
)
def test_what_has_no_place_in_json_leaves_the_folder_as_it_was(tmp_path, about):
    saved(tmp_path, run={"seed": 1})
    before = contents(tmp_path)
    with pytest.raises((TypeError, ValueError)):
        VQVAE(16, 8, 64).save_pretrained(tmp_path, **about)
    assert contents(tmp_path) == before


def weight_norm(model):
    torch.nn.utils.parametrizations.weight_norm(model.decoder[0])


def other_decoder(model):
    model.decoder = torch.nn.Conv2d(8, 3, 1)


def more_codes(model):
    model.quantizer = type(model.quantizer)(8, 64, channel_first=True)


def more_layers(model):
    model.head = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("change", [weight_norm, other_decoder, more_layers])
def test_a_model_that_was_changed_is_refused_before_anything_is_written(tmp_path, change):
    saved(tmp_path)
    before, model = contents(tmp_path), VQVAE(16, 8, 32)
    change(model)
    with pytest.raises(ValueError, match="The model was changed.*state_dict.*Nothing was written"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_another_codebook_is_saved_as_it_is(tmp_path):
    model = VQVAE(16, 8, 32)
    more_codes(model)
    model.save_pretrained(tmp_path)
    assert same(VQVAE.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("part", ["all", "encoder"])
def test_a_compiled_model_is_saved_like_one_that_is_not(tmp_path, part):
    model = saved(tmp_path / "plain")
    if part == "all":
        rotvq.run.model.save_pretrained(
            torch.compile(model, backend="eager"), tmp_path / "compiled"
        )
    else:
        model.encoder = torch.compile(model.encoder, backend="eager")
        model.save_pretrained(tmp_path / "compiled")
    assert same(
        VQVAE.from_pretrained(tmp_path / "compiled"), VQVAE.from_pretrained(tmp_path / "plain")
    )


@pytest.mark.parametrize("options", [{"frozen": True}, {"decay": 0.3, "commitment": 2.0}])
def test_what_was_set_after_it_was_made_is_saved(tmp_path, options):
    model = VQVAE(16, 8, 32)
    for name, value in options.items():
        setattr(model.quantizer, name, value)
    model.save_pretrained(tmp_path)
    again = VQVAE.from_pretrained(tmp_path).quantizer
    assert {name: getattr(again, name) for name in options} == options


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_damaged_files_of_a_model_are_named(tmp_path, name, text):
    saved(tmp_path, run={"seed": 1})
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read_config(tmp_path)
