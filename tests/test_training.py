"""Runs: equal conditions, resuming, the command line, and what happens when something is wrong."""
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch.testing import assert_close

import rotvq.cli as cli
import rotvq.model as model
import rotvq.training as training
from rotvq import VQVAE
from rotvq.cli import comparison_table, main
from rotvq.codebook import perplexity, usage
from rotvq.data import SAMPLE, Source, decode_picture, list_pictures
from rotvq.metrics import psnr
from rotvq.training import PRESETS, Learner, batches, evaluate, find_preset, to_float, train

TINY = dataclasses.replace(PRESETS["smoke"], name="tiny", limit=48, epochs=2)
METRICS = {"mse", "psnr", "quantization_error", "relative_error", "usage", "perplexity", "images"}


def test_estimators_start_alike_and_see_the_same_batches():
    torch.manual_seed(123)                                               # what ran before must not matter
    a, b = Learner(TINY, "ste", 0, torch.device("cpu")), Learner(TINY, "rotation", 0, torch.device("cpu"))
    assert all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    (loss_a, counts_a), (loss_b, counts_b) = a.step(x), b.step(x)
    assert torch.equal(loss_a, loss_b) and torch.equal(counts_a, counts_b)
    decoders = [learner.model.decoder.state_dict() for learner in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*(d.values() for d in decoders)))       # the decoder's gradient is the same
    encoders = [learner.model.encoder.state_dict() for learner in (a, b)]
    assert not all(torch.equal(x, y) for x, y in zip(*(e.values() for e in encoders)))   # the encoder's is not


def test_side_by_side_equals_alone(tmp_path):
    train(TINY, ("ste", "rotation"), SAMPLE, tmp_path / "both", quiet=True)
    train(TINY, ("rotation",), SAMPLE, tmp_path / "alone", quiet=True)
    a, b = VQVAE.from_pretrained(tmp_path / "both" / "rotation"), VQVAE.from_pretrained(tmp_path / "alone")
    for x, y in zip(a.state_dict().values(), b.state_dict().values()): assert_close(x, y)


def test_step_runs_on_meta_so_it_never_reads_a_value():
    learner = Learner(TINY, "rotation", 0, torch.device("meta"))
    mse, counts = learner.step(torch.zeros(4, 3, 32, 32, device="meta"))
    assert mse.device.type == "meta" and counts.shape == (TINY.codebook_size,)


def test_model_compiles_without_a_graph_break():
    model = VQVAE(16, 8, 32)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.rand(2, 3, 16, 16) * 2 - 1
    out = compiled(x)
    ((out.x_hat - x).square().mean() + out.loss).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_killed_run_resumes_to_the_same_end(tmp_path):
    "SIGKILL in the middle of a process, then --resume: the same weights and metrics as a run that was left alone."
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    script = ("import sys, time, dataclasses; from rotvq.training import *; from rotvq.training import Learner\n"
              "step = Learner.step; Learner.step = lambda self, x: (time.sleep(.05), step(self, x))[1]\n"
              f"train(dataclasses.replace(PRESETS['smoke'], name='tiny', limit=48, epochs=3), ('rotation',), 'sample', {str(tmp_path / 'killed')!r})")
    child = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed" / "state.pt").exists() and time.monotonic() < deadline and child.poll() is None: time.sleep(.01)
        assert child.poll() is None, "the run ended before it could be killed"
        child.send_signal(signal.SIGKILL)
    finally: child.kill(); child.wait(); child.stdout.close()
    preset = dataclasses.replace(TINY, epochs=3)
    resumed = train(preset, ("rotation",), SAMPLE, tmp_path / "killed", resume=True, quiet=True)
    whole = train(preset, ("rotation",), SAMPLE, tmp_path / "whole", quiet=True)
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert drop(resumed.rows) == drop(whole.rows) and len(whole.rows) == 3
    a, b = VQVAE.from_pretrained(tmp_path / "killed"), VQVAE.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == resumed.rows


def test_a_run_is_never_overwritten(tmp_path):
    train(TINY, ("ste",), SAMPLE, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="--resume"): train(TINY, ("ste",), SAMPLE, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="seed"): train(TINY, ("ste",), SAMPLE, tmp_path / "run", seed=1, resume=True, quiet=True)
    with pytest.raises(ValueError, match="state.pt"): train(TINY, ("ste",), SAMPLE, tmp_path / "none", resume=True, quiet=True)
    assert not (tmp_path / "none").exists()


def test_a_loss_that_is_no_number_stops_at_once_and_keeps_the_last_state(tmp_path, monkeypatch):
    real, calls = Learner.step, []
    def step(self, x):
        calls.append(1)
        mse, counts = real(self, x)
        return (mse * float("nan") if len(calls) > 4 else mse), counts
    monkeypatch.setattr(Learner, "step", step)
    with pytest.raises(FloatingPointError, match="epoch 2"): train(TINY, ("ste",), SAMPLE, tmp_path / "run", quiet=True)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("init", ["uniform", "normal", "kmeans"])
def test_every_start_trains_and_is_the_same_for_all_estimators(tmp_path, monkeypatch, init):
    starts, real = [], training.run_epoch
    def look(preset, learners, *args):
        starts.extend(learner.model.quantizer.codebook.clone() for learner in learners.values())
        return real(preset, learners, *args)
    monkeypatch.setattr(training, "run_epoch", look)
    run = train(dataclasses.replace(TINY, init=init, epochs=1), ("ste", "rotation"), SAMPLE, tmp_path / init, quiet=True)
    assert len(starts) == 2 and torch.equal(*starts)
    assert METRICS | {"train_mse", "batch_usage", "seconds"} <= set(run.rows[0])


def test_evaluate_against_the_plain_definitions():
    torch.manual_seed(0)
    model = VQVAE(16, 8, 32, init="normal")
    images = torch.randint(256, (10, 3, 16, 16), dtype=torch.uint8)
    result = evaluate(model.train(), images, batch=4)
    assert model.training
    model.eval()
    with torch.no_grad():
        x = to_float(images)
        z, out = model.encoder(x), model(x)
    q = model.quantizer.codebook[out.indices].permute(0, 3, 1, 2)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 8).double()
    assert result["relative_error"] == pytest.approx(((z - q).square().mean() / rows.var(0, correction=0).mean()).item(), rel=1e-4)
    counts = torch.bincount(out.indices.flatten(), minlength=32)
    assert set(result) == METRICS and result["images"] == 10
    assert result["mse"] == pytest.approx((out.x_hat - x).square().mean().item(), rel=1e-5)
    assert result["psnr"] == pytest.approx(psnr(result["mse"]))
    assert result["quantization_error"] == pytest.approx((z - q).square().mean().item(), rel=1e-5)
    assert result["usage"] == pytest.approx((counts > 0).double().mean().item())
    p = counts[counts > 0] / counts.sum()
    assert result["perplexity"] == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-5)


def test_a_validation_that_is_no_number_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *args: {"mse": float("nan"), "quantization_error": 1.0, "relative_error": 1.0})
    with pytest.raises(FloatingPointError, match="validation after epoch 1"): train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {".lock"}


@pytest.mark.parametrize("spoil", [b"", b"x" * 100])
def test_damaged_files_are_named(tmp_path, capsys, spoil):
    train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
    (tmp_path / "run" / "state.pt").write_bytes(spoil)
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 1
    (tmp_path / "run" / "model.safetensors").write_bytes(spoil)
    assert main(["eval", str(tmp_path / "run"), "--data", "sample", "--limit", "4"]) == 1
    said = capsys.readouterr().err
    assert "state.pt cannot be read" in said and "is damaged" in said and said.count("\n") == 2


@pytest.mark.parametrize("estimators", [(), ("ste", "ste"), "nothing"])
def test_estimators_are_checked(tmp_path, estimators):
    with pytest.raises(ValueError): train(TINY, estimators, SAMPLE, tmp_path / "run", quiet=True)


def test_metrics_of_nothing():
    assert usage(torch.zeros(4)) == 0 and perplexity(torch.zeros(4)) == 1


def test_presets(monkeypatch):
    monkeypatch.setenv("ROTVQ_PRESET", "smoke")
    assert find_preset("auto").name == "smoke" and find_preset(TINY) is TINY
    monkeypatch.delenv("ROTVQ_PRESET")
    assert find_preset().name == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="huge"): find_preset("huge")


def test_small_sets_make_one_batch():
    assert [len(x) for x in batches(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), 64, 0, 0)] == [5]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of the command line on the smallest preset."
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--preset", "smoke", "--data", "sample", "--out", str(out)]) == 0
    return out


def test_the_run_folder(trained, capsys):
    config = json.loads((trained / "config.json").read_text())
    assert "root" not in config["run"] and config["run"]["data"] == "sample" and config["run"]["preset"]["name"] == "smoke" and config["machine"]["device"]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["estimator"]) for r in rows] == [(1, "ste"), (1, "rotation"), (2, "ste"), (2, "rotation")]
    assert all(row["data"] == "sample" for row in rows)
    for name in ("ste", "rotation"):
        assert {p.name for p in (trained / name).iterdir()} == {"config.json", "metrics.jsonl", "model.safetensors"}
    assert Image.open(trained / "reconstructions.png").width > 500 and Image.open(trained / "curves.png").width > 500
    assert main(["train", "--resume", "--data", "sample", "--out", str(trained)]) == 0            # finished: shows the table again
    said = capsys.readouterr().out
    assert comparison_table(rows) in said and "sample" in said and "k-means" not in said


def test_what_the_gap_depends_on_stands_beside_the_table_it_is_true_for(tmp_path, monkeypatch, capsys, trained):
    "The preset cpu on pictures that are no sample; the training itself is left out here."
    monkeypatch.setattr(cli, "imagenet10", lambda root: Source(SAMPLE.root, "pictures"))
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    fake = training.Run(trained, {"estimators": ["ste", "rotation"]})
    fake.rows = rows
    monkeypatch.setattr(cli, "train", lambda *args: fake)
    monkeypatch.setattr(cli, "save_pictures", lambda *args: [])
    monkeypatch.setattr(cli, "ImageNet10", lambda *args: SimpleNamespace(images=None))
    assert main(["train", "--preset", "cpu", "--out", str(tmp_path)]) == 0
    assert "k-means start" in capsys.readouterr().out
    assert main(["train", "--preset", "smoke", "--out", str(tmp_path)]) == 0
    assert "preset cpu" in capsys.readouterr().out


def test_eval_and_reconstruct(trained, tmp_path, capsys):
    assert main(["eval", str(trained / "rotation"), "--data", "sample", "--json", "--limit", "40"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == METRICS | {"data"} and result["images"] == 40 and result["data"] == "sample"
    assert main(["eval", str(trained / "ste" / "model.safetensors"), "--data", "sample", "--limit", "40"]) == 0
    assert "quantization_error" in capsys.readouterr().out
    pictures = [str(p) for p in list_pictures(SAMPLE.root, "val")[0]]
    assert main(["reconstruct", str(trained / "rotation"), *pictures, "--out", str(tmp_path / "deep" / "out.png")]) == 0
    sheet = torch.tensor(decode_picture(tmp_path / "deep" / "out.png", 64))
    assert sheet.float().std() > 10


@pytest.mark.parametrize("arguments, code, words", [
    (["eval", "nowhere"], 1, "nowhere"), (["train", "--data", "nowhere", "--preset", "smoke"], 1, "nowhere"),
    (["train", "--resume", "--out", "nowhere"], 1, "nowhere"), (["train", "--resume"], 1, "no run to resume"), (["data", "--root", "nowhere"], 1, "nowhere")])
def test_mistakes_end_with_one_line_and_exit_code_1(arguments, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    said = capsys.readouterr()
    assert words in said.err and said.err.startswith("rotvq: ") and said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_comparison_names_the_models_inside(trained, capsys):
    assert main(["eval", str(trained), "--data", "sample"]) == 1
    said = capsys.readouterr().err
    assert str(trained / "rotation") in said and str(trained / "ste") in said


@pytest.mark.parametrize("arguments", [[], ["train", "--preset", "huge"], ["fly"], ["eval"], ["reconstruct", "x", "y"], ["train", "--seed", "-1"], ["train", "--seed", str(10**15)],
    ["reconstruct", "x", "y", "--out", "z.png", "--size", "0"]])
def test_bad_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as error: main(arguments)
    assert error.value.code == 2 and "usage: rotvq" in capsys.readouterr().err


def test_help_and_module(tmp_path):
    for command in ([sys.executable, "-m", "rotvq"], ["rotvq"]):
        for words in (["--help"], ["train", "--help"]):
            out = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path)
            assert out.returncode == 0 and "usage: rotvq" in out.stdout


def test_interrupt_says_how_to_continue(tmp_path, monkeypatch, capsys):
    real, calls = Learner.step, []
    def step(self, x):
        calls.append(1)
        if len(calls) == 12: raise KeyboardInterrupt
        return real(self, x)
    monkeypatch.setattr(Learner, "step", step)
    assert main(["train", "--preset", "smoke", "--estimator", "ste", "--data", "sample", "--out", str(tmp_path / "a run")]) == 130
    command = shlex.split(capsys.readouterr().err.split("continue with: ")[1])
    env = {k: v for k, v in os.environ.items() if k not in ("ROTVQ_DATA", "ROTVQ_PRESET")}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)     # as it stands, from anywhere
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_custom_estimator_is_saved_by_name_and_needs_a_replacement(tmp_path):
    def mine(z, q): return q
    model = VQVAE(16, 8, 32, estimator=mine)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="custom:mine.*estimator="): VQVAE.from_pretrained(tmp_path)
    again = VQVAE.from_pretrained(tmp_path, estimator="ste")
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(again(x).x_hat, model.eval()(x).x_hat)


def test_stopwatch_adds_up_and_keeps_what_it_had():
    watch = training.Stopwatch(torch.device("cpu"))
    watch.total = 10.0
    for _ in range(2):
        with watch: time.sleep(0.01)
    first = watch.read()
    assert 10.02 <= first < 11 and watch.read() == first


# What can happen to a folder


def test_two_runs_do_not_share_a_folder(tmp_path):
    "The second one is told so; a lock whose process was killed holds nobody back."
    code = ("import sys, time; from rotvq.training import *; from rotvq.training import alone_in; from pathlib import Path\n"
            "with alone_in(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)")
    (tmp_path / "run").mkdir()
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="Another process is training"): train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
        assert {p.name for p in (tmp_path / "run").iterdir()} <= {".lock"}
        child.send_signal(signal.SIGKILL)
        child.wait()
        train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
    finally: child.kill(); child.wait(); child.stdout.close()
    assert {p.name for p in (tmp_path / "run").iterdir()} - {".lock"} == {"config.json", "metrics.jsonl", "model.safetensors", "state.pt"}


def test_flipped_bits_in_the_state_are_noticed(tmp_path):
    train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
    file = tmp_path / "run" / "state.pt"
    whole = file.read_bytes()
    for place in (len(whole) // 4, len(whole) // 2, 3 * len(whole) // 4):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        with pytest.raises(ValueError, match="state.pt cannot be read"): train(TINY, "ste", SAMPLE, tmp_path / "run", resume=True, quiet=True)
    file.write_bytes(whole)
    assert train(TINY, "ste", SAMPLE, tmp_path / "run", resume=True, quiet=True).rows


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to write to")
@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "metrics.jsonl"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, capsys, monkeypatch, name):
    arguments = ["train", "--preset", "smoke", "--estimator", "ste", "--data", "sample", "--out", str(tmp_path / "run")]
    real, calls = training.run_epoch, []
    def epoch(*args):
        calls.append(1)
        if len(calls) == 2:                                                               # the second epoch finds the disk full
            if name == "model.safetensors": monkeypatch.setattr(model, "save_file", no_space)
            else: (tmp_path / "run" / f".{name}").symlink_to("/dev/full")
        return real(*args)
    def no_space(tensors, file):                                                          # safetensors replaces a link
        file.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(training, "run_epoch", epoch)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("rotvq: ") and said.count("\n") == 1 and f"{name} cannot be written" in said
    assert {p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")} <= {".lock"}
    assert training.load_state(tmp_path / "run")["epoch"] == 1
    monkeypatch.undo()
    assert main([*arguments, "--resume"]) == 0                                            # there is room again
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": 3}', '{"model": {"widths": 3}}', '{"model": {"width": 8}}'])
@pytest.mark.parametrize("command", [["eval"], ["reconstruct", "x.png", "--out", "y.png"]], ids=lambda c: c[0])
def test_a_broken_config_is_named(trained, tmp_path, capsys, text, command):
    for name in ("model.safetensors", "config.json"): (tmp_path / name).write_bytes((trained / "ste" / name).read_bytes())
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    (tmp_path / "config.json").write_text(text)
    verb, *rest = command
    assert main([verb, str(tmp_path), *[str(tmp_path / word) if word.endswith(".png") else word for word in rest]] + (["--data", "sample"] if verb == "eval" else [])) == 1
    said = capsys.readouterr().err
    assert said.startswith("rotvq: ") and "config.json" in said and str(tmp_path) in said


def test_a_wrong_argument_of_from_pretrained_is_a_type_error(trained):
    with pytest.raises(TypeError, match="widht"): VQVAE.from_pretrained(trained / "ste", widht=3)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop: main(["--version"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and said.startswith("rotvq 0.") and torch.__version__ in said


def test_an_interrupt_while_the_command_loads_shows_no_traceback():
    code = "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['rotvq.cli'] = Stop = type('Stop', (), {}); import rotvq_command\n" \
           "def interrupt(*_): raise KeyboardInterrupt\nimport builtins; builtins.__import__ = interrupt\n" \
           "sys.exit(rotvq_command.main())"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    fast = subprocess.run([sys.executable, "-X", "importtime", "-c", "import sys; sys.path.insert(0, sys.argv[1]); import rotvq_command", root], capture_output=True, text=True)
    assert fast.returncode == 0 and "torch" not in fast.stderr               # nothing slow comes before
