"""The command line: what it prints and writes, where settings come from, and how mistakes end."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import rotvq.cli as cli
import rotvq.run.training as training
from helpers import METRICS
from rotvq import VQVAE
from rotvq.cli import main, parse
from rotvq.run.data import SAMPLE, Source, decode_picture, list_pictures
from rotvq.run.report import comparison_table
from rotvq.run.training import PRESETS

DEFAULT = ("ste", "rotation", "rotation-until-used")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of the command line on the smallest preset."
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--preset", "smoke", "--data", "sample", "--out", str(out)]) == 0
    return out


def test_the_run_folder(trained, capsys):
    config = json.loads((trained / "run.json").read_text())
    assert (
        "root" not in config["run"]
        and config["run"]["data"] == "sample"
        and config["run"]["preset"]["name"] == "smoke"
        and config["machine"]["device"]
    )
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["estimator"]) for r in rows] == [
        (epoch, name) for epoch in (1, 2) for name in DEFAULT
    ]
    assert all(row["data"] == "sample" for row in rows)
    for name in DEFAULT:
        assert {p.name for p in (trained / name).iterdir()} == {
            "config.json",
            "run.json",
            "metrics.jsonl",
            "model.safetensors",
        }
    assert (
        Image.open(trained / "reconstructions.png").width > 500
        and Image.open(trained / "curves.png").width > 500
    )
    assert (
        main(["train", "--resume", "--data", "sample", "--out", str(trained)]) == 0
    )  # finished: shows the table again
    said = capsys.readouterr().out
    assert str(comparison_table(rows)) in said and "sample" in said and "k-means" not in said


def test_what_the_gap_depends_on_stands_beside_the_table_it_is_true_for(
    tmp_path, monkeypatch, capsys, trained
):
    "The preset cpu on pictures that are no sample; the training itself is left out here."
    monkeypatch.setattr(cli, "imagenet10", lambda root: Source(SAMPLE.root, "pictures"))
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    fake = training.Run(trained, {"estimators": DEFAULT})
    fake.rows = rows
    monkeypatch.setattr(cli, "train", lambda *args, **options: fake)
    monkeypatch.setattr(cli, "save_pictures", lambda *args: [])
    monkeypatch.setattr(cli, "ImageNet10", lambda *args: SimpleNamespace(images=None))
    assert main(["train", "--preset", "cpu", "--out", str(tmp_path)]) == 0
    assert "The rotation's lead in error ends" in " ".join(capsys.readouterr().out.split())
    assert main(["train", "--preset", "smoke", "--out", str(tmp_path)]) == 0
    assert "preset cpu" in capsys.readouterr().out


def test_eval_and_reconstruct(trained, tmp_path, capsys):
    assert (
        main(["eval", str(trained / "rotation"), "--data", "sample", "--json", "--limit", "40"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (
        set(result) == METRICS | {"data"} and result["images"] == 40 and result["data"] == "sample"
    )
    assert (
        main(
            [
                "eval",
                str(trained / "ste" / "model.safetensors"),
                "--data",
                "sample",
                "--limit",
                "40",
            ]
        )
        == 0
    )
    assert "quantization_error" in capsys.readouterr().out
    pictures = [str(p) for p in list_pictures(SAMPLE.root, "val")[0]]
    assert (
        main(
            [
                "reconstruct",
                *pictures,
                "--checkpoint",
                str(trained / "rotation"),
                "--out",
                str(tmp_path / "deep" / "out.png"),
            ]
        )
        == 0
    )
    sheet = torch.tensor(decode_picture(tmp_path / "deep" / "out.png", 64))
    assert sheet.float().std() > 10


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["eval", "nowhere"], 1, "nowhere"),
        (["train", "--data", "nowhere", "--preset", "smoke"], 1, "nowhere"),
        (["train", "--resume", "--out", "nowhere"], 1, "nowhere"),
        (["train", "--resume"], 1, "no run to resume"),
        (["train", "--seed", "-1", "--preset", "smoke", "--data", "sample"], 1, "seed = -1"),
        (["train", "--config", "nowhere.json"], 1, "nowhere.json"),
        (["train", "--batch", "0", "--preset", "smoke", "--data", "sample"], 1, "batch = 0"),
        (["report", "nowhere"], 1, "nowhere"),
        (["train", "--estimators", "stee", "--preset", "smoke", "--data", "sample"], 1, "stee"),
        (["data", "--root", "nowhere"], 1, "nowhere"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_1(
    arguments, code, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("rotvq: ") and said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_comparison_names_the_models_inside(trained, capsys):
    assert main(["eval", str(trained), "--data", "sample"]) == 1
    said = capsys.readouterr().err
    assert str(trained / "rotation") in said and str(trained / "ste") in said


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train", "--preset", "huge"],
        ["fly"],
        ["eval"],
        ["reconstruct", "x", "--size", "big"],
        ["train", "--lr", "fast"],
        ["train", "--schedule", "step"],
        ["train", "--lrr", "1"],
    ],
)
def test_bad_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "rotvq" in capsys.readouterr().err


@pytest.mark.slow
def test_help_and_module(tmp_path):
    for command in ([sys.executable, "-m", "rotvq", "--help"], ["rotvq", "train", "--help"]):
        out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert out.returncode == 0 and "usage: rotvq" in out.stdout


def test_custom_estimator_is_saved_by_name_and_needs_a_replacement(tmp_path):
    def mine(z, q):
        return q

    model = VQVAE(16, 8, 32, estimator=mine)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="custom:mine.*estimator="):
        VQVAE.from_pretrained(tmp_path)
    again = VQVAE.from_pretrained(tmp_path, estimator="ste")
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(again(x).x_hat, model.eval()(x).x_hat)


def test_stopwatch_adds_up_and_keeps_what_it_had():
    watch = training.Stopwatch(torch.device("cpu"))
    watch.total = 10.0
    for _ in range(2):
        with watch:
            time.sleep(0.01)
    first = watch.read()
    assert 10.02 <= first < 11 and watch.read() == first


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"model": 3}', '{"model": {"widths": 3}}', '{"widths": 3}', '{"width": 8}'],
)
@pytest.mark.parametrize("verb", ["eval", "reconstruct"])
def test_a_broken_config_is_named(trained, tmp_path, capsys, text, verb):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((trained / "ste" / name).read_bytes())
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    (tmp_path / "config.json").write_text(text)
    words = (
        ["eval", str(tmp_path), "--data", "sample"]
        if verb == "eval"
        else [
            "reconstruct",
            str(tmp_path / "x.png"),
            "--checkpoint",
            str(tmp_path),
            "--out",
            str(tmp_path / "y.png"),
        ]
    )
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("rotvq: ") and "config.json" in said and str(tmp_path) in said


@pytest.mark.slow
def test_a_photo_goes_through_the_model_that_comes_with_the_package(tmp_path, capsys):
    "The first thing that somebody tries, in a folder that is not the clone."
    photo = list_pictures(SAMPLE.root, "val")[0][0]
    done = subprocess.run(
        [sys.executable, "-m", "rotvq", "reconstruct", str(photo)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "10240 bits a picture" in done.stdout and (tmp_path / "reconstruction.png").exists()
    model = VQVAE.from_pretrained(cli.PRETRAINED)
    x = training.to_float(torch.tensor(decode_picture(photo, 64))[None])
    with torch.no_grad():
        x_hat = model(x).x_hat
    assert (x_hat - x).square().mean() < 0.03  # a photograph that it has not seen


@pytest.mark.slow
def test_eval_in_full(trained, capsys, monkeypatch):
    pytest.importorskip("torchmetrics")
    words = ["eval", str(trained / "ste"), "--data", "sample", "--limit", "24", "--full", "--json"]

    def result():
        assert main(words) == 0
        return json.loads(capsys.readouterr().out)

    perceptual, judge = (
        {"ssim", "lpips", "r_fid", "r_is"},
        {"judge_originals", "judge_reconstructions", "judge_distance"},
    )
    found = result()
    assert METRICS | perceptual <= set(found) and not judge & set(
        found
    )  # the judge does not know the classes of the sample
    monkeypatch.setattr(cli, "judge_classes", lambda: cli.ImageNet10("val", 32, SAMPLE, 24).classes)
    assert METRICS | perceptual | judge <= set(result())


def test_a_wrong_argument_of_from_pretrained_is_a_type_error(trained):
    with pytest.raises(TypeError, match="widht"):
        VQVAE.from_pretrained(trained / "ste", widht=3)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and said.startswith("rotvq 0.") and torch.__version__ in said


@pytest.mark.slow
def test_an_interrupt_while_the_command_loads_shows_no_traceback():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['rotvq.cli'] = Stop ="
        " type('Stop', (), {}); import rotvq_command\ndef interrupt(*_): raise"
        " KeyboardInterrupt\nimport builtins; builtins.__import__ ="
        " interrupt\nsys.exit(rotvq_command.main())"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    fast = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-c",
            "import sys; sys.path.insert(0, sys.argv[1]); import rotvq_command",
            root,
        ],
        capture_output=True,
        text=True,
    )
    assert fast.returncode == 0 and "torch" not in fast.stderr  # nothing slow comes before


# Where settings come from


def test_options_change_a_preset():
    args = parse(
        [
            "train",
            "--preset",
            "cuda",
            "--lr",
            "1e-4",
            "--ema",
            "0.99",
            "--estimators",
            "ste",
            "--no-compile",
            "--micro-batch",
            "32",
        ]
    )
    assert args.settings == dataclasses.replace(
        PRESETS["cuda"], lr=1e-4, ema=0.99, micro_batch=32
    ) and args.estimators == ("ste",)
    assert parse(["train"]).settings == PRESETS[os.environ["ROTVQ_PRESET"]]


def test_every_setting_is_an_option(capsys):
    with pytest.raises(SystemExit):
        parse(["train", "--help"])
    said = capsys.readouterr().out
    for field in dataclasses.fields(training.Config):
        assert f"--{field.name.replace('_', '-')}" in said, field.name


def test_settings_from_a_file(tmp_path, trained):
    (tmp_path / "mine.json").write_text(json.dumps(dataclasses.asdict(PRESETS["paper-f4"])))
    assert parse(["train", "--config", str(tmp_path / "mine.json")]).settings == PRESETS["paper-f4"]
    again = parse(
        ["train", "--config", str(trained / "run.json"), "--epochs", "7"]
    ).settings  # that of a run
    assert again == dataclasses.replace(PRESETS["smoke"], epochs=7)


def test_a_run_is_resumed_with_its_own_settings(trained):
    args = parse(["train", "--resume", "--out", str(trained)])
    assert (
        args.settings == PRESETS["smoke"] and args.estimators == DEFAULT and args.data == "sample"
    )
    assert (
        parse(["train", "--resume", "--out", str(trained), "--seed", "3"]).seed == 3
    )  # and refused later: see the test of faults


def test_several_processes_need_a_folder(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--preset", "smoke", "--data", "sample"]) == 1
    assert "--out" in capsys.readouterr().err


def test_report_is_one_page_that_asks_for_nothing_else(trained, capsys):
    assert main(["report", str(trained)]) == 0
    page = (trained / "report.html").read_text()
    assert (
        page.count("data:image/png;base64") == 3
        and "http" not in page.replace("http-equiv", "")
        and "<script" not in page
    )
    for words in ("straight-through", "codebook_size", "commit", "versions", "Reconstructions"):
        assert words in page
