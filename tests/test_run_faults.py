"""What can go wrong around a run: clocks, streams, curves, other people's files, pictures that move
or break, settings that are none."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rotvq.cli as cli
import rotvq.run.data as data
import rotvq.run.records as records
import rotvq.run.training as training
from helpers import CPU, TINY, lines, losses_become, noise, picture_folder, same_weights
from rotvq.cli import main
from rotvq.run.data import SAMPLE, DataError
from rotvq.run.training import PRESETS, Config, Learner, check_config, find_preset, train

RUN = ["train", "--preset", "smoke", "--estimators", "ste", "--limit", "32", "--epochs", "1"]


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run of two epochs, to be copied."
    out = tmp_path_factory.mktemp("finished") / "run"
    train(TINY, ("ste", "rotation"), SAMPLE, out, quiet=True, save_minutes=0, keep=9)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def error_of(words, capsys) -> str:
    "The one line with which a command ends."
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("rotvq: ") and said.count("\n") == 1, said
    return said


def step_that(monkeypatch, number: int, act) -> None:
    "Do something before the step of this number."
    real, calls = Learner.step, []

    def step(self, x, lr=None):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(self, x, lr)

    monkeypatch.setattr(Learner, "step", step)


# States


def test_the_dates_of_states_do_not_matter(copy):
    "A clock that went back, states copied from another machine: the furthest is the newest."
    for file in records.states_of(copy)[:2]:
        file.unlink()
    for file in records.states_of(copy):
        os.utime(file, (2e9, 2e9))
    train(TINY, ("ste", "rotation"), SAMPLE, copy, resume=True, quiet=True, save_minutes=0, keep=2)
    held = [file.name for file in records.states_of(copy)]
    assert held == ["00002-0000000.pt", "00001-0000003.pt"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["learners"].pop("ste"),
        lambda state: state["learners"]["ste"].pop("opt"),
        lambda state: state["learners"]["ste"]["model"].pop("quantizer.book.codes"),
        lambda state: state.update(random=torch.zeros(3)),
        lambda state: state.update(record="{"),
        lambda state: state.update(config="{}"),
    ],
    ids=["learner", "optimizer", "codes", "random", "record", "config"],
)
def test_a_state_with_other_contents_is_named(copy, capsys, spoil):
    file = records.states_of(copy)[0]
    state = torch.load(file)
    spoil(state)
    torch.save(state, file)
    said = error_of(["train", "--resume", "--out", copy], capsys)
    assert f"{file} does not hold what belongs there" in said and "Remove it" in said
    file.unlink()  # as it says
    assert main(["train", "--resume", "--out", str(copy)]) == 0


# Streams, curves, TensorBoard


class Gone(io.StringIO):
    "A stream whose reader has left after some lines."

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_run_outlives_the_reader_of_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main([*RUN, "--data", "sample", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert said.count("the lines of this run cannot be written any more") == 1
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    assert records.load_state(tmp_path / "run")["epoch"] == 1


def test_what_is_printed_of_an_epoch_is_on_disk(tmp_path, monkeypatch):
    "When a line says that an epoch is finished its state is there."
    seen = []

    class Watched(io.StringIO):
        def write(self, text):
            if "val MSE" in text:
                seen.append([file.name for file in records.states_of(tmp_path / "run")])
            return len(text)

    monkeypatch.setattr(sys, "stdout", Watched())
    train(TINY, "ste", SAMPLE, tmp_path / "run")
    assert seen and seen[0][0] == "00001-0000000.pt" and seen[-1][0] == "00002-0000000.pt"


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
def test_closed_streams(tmp_path, closed):
    "As a daemon has them."
    closing = " ".join(f"{number}>&-" for number in closed.split())
    words = " ".join([*RUN, "--data", "sample", "--out", str(tmp_path / "run")])
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m rotvq {words} {closing}"])
    assert done.returncode == 0 and records.load_state(tmp_path / "run")["epoch"] == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp1251"])
def test_output_in_any_encoding(tmp_path, monkeypatch, encoding):
    for name in ("stdout", "stderr"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, name, stream)
    assert main([*RUN, "--data", "sample", "--out", str(tmp_path / "run")]) == 0
    sys.stdout.flush()
    assert b"straight-through" in sys.stdout.buffer.getvalue()
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["eval", "reconstruct"])
def test_a_reader_that_leaves_gets_no_traceback(finished, tmp_path, verb):
    picture = next((SAMPLE.root / "val").rglob("*.jpg"))
    words = ["eval", str(finished / "ste"), "--data", "sample", "--limit", "4"]
    if verb == "reconstruct":
        words = ["reconstruct", str(picture), "--out", str(tmp_path / "x.png")]
    read, write = os.pipe()
    os.close(read)
    child = [sys.executable, "-m", "rotvq", *words]
    done = subprocess.run(child, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to write to")
def test_a_full_disk_under_what_was_asked_for_is_said(finished):
    words = [sys.executable, "-m", "rotvq", "eval", str(finished / "ste"), "--limit", "4"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "The output cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_tensorboard_that_goes_away_ends_its_events_only(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    board = tmp_path / "run" / "tensorboard"

    def remove():
        while board.exists():
            shutil.rmtree(board, ignore_errors=True)

    step_that(monkeypatch, 2, remove)
    run = train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
    assert len(run.rows) == 2
    assert capsys.readouterr().err.count("no more events for TensorBoard") == 1


def test_a_tensorboard_that_cannot_be_imported_ends_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert len(train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True).rows) == 2
    assert capsys.readouterr().err.count("no more events for TensorBoard") == 1


@pytest.mark.parametrize("text", ["", "{", "null\n", "[1]\n", '{"step": "x"}\n', "\xff\n"])
def test_damaged_curves_do_not_stop_a_run(copy, text):
    kept = (copy / "steps.jsonl").read_text()
    (copy / "steps.jsonl").write_text(kept[:200] + "\n" + text, encoding="latin-1")
    records.states_of(copy)[0].unlink()
    run = train(TINY, ("ste", "rotation"), SAMPLE, copy, resume=True, quiet=True)
    assert len(run.rows) == 4 and all("step" in row for row in lines(copy / "steps.jsonl"))


def test_curves_that_cannot_be_written_are_said_once(tmp_path, monkeypatch, capsys):
    def folder():
        (tmp_path / "run" / "steps.jsonl").unlink()
        (tmp_path / "run" / "steps.jsonl").mkdir()

    step_that(monkeypatch, 2, folder)
    assert len(train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True).rows) == 2
    assert capsys.readouterr().err.count("steps.jsonl cannot be written") == 1
    monkeypatch.undo()
    records.states_of(tmp_path / "run")[0].unlink()
    again = train(TINY, "ste", SAMPLE, tmp_path / "run", resume=True, quiet=True)
    assert len(again.rows) == 2
    assert capsys.readouterr().err.count("steps.jsonl cannot be written") == 1


# Folders


@pytest.mark.parametrize("name", [*records.RESULTS, "rotation/config.json"])
def test_a_new_run_writes_over_nothing(tmp_path, name):
    "A folder of one's own, or a finished run whose states were removed to save room."
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    (tmp_path / "notes.txt").write_text("no matter")
    with pytest.raises(ValueError, match=f"{name} is there already.*another folder"):
        train(TINY, ("ste", "rotation"), SAMPLE, tmp_path, quiet=True)
    assert (tmp_path / name).read_text() == "mine"
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 2


def test_a_start_that_loses_leaves_the_folder_to_the_other(tmp_path, capsys):
    "Which has written nothing yet but its lock."
    out = tmp_path / "run"
    with records.alone_in(out):
        said = error_of([*RUN, "--data", "sample", "--out", out], capsys)
        assert "Another process is training" in said and (out / ".lock").exists()
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    "words", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"]
)
def test_memory_that_runs_out_is_not_blamed_on_a_state(copy, monkeypatch, words):
    def load(*args, **options):
        raise RuntimeError(words)

    monkeypatch.setattr(Learner, "restore", load)
    with pytest.raises(ValueError, match="Not enough memory for .* pictures"):
        train(TINY, ("ste", "rotation"), SAMPLE, copy, resume=True, quiet=True)
    monkeypatch.setattr(records.torch, "load", load)
    with pytest.raises((ValueError, RuntimeError)) as error:
        train(TINY, ("ste", "rotation"), SAMPLE, copy, resume=True, quiet=True)
    assert "cannot be read" not in str(error.value) and records.states_of(copy)


def test_a_sheet_is_a_png_whatever_it_is_called(tmp_path):
    picture = next((SAMPLE.root / "val").rglob("*.jpg"))
    assert main(["reconstruct", str(picture), "--out", str(tmp_path / "sheet")]) == 0
    assert (tmp_path / "sheet").read_bytes().startswith(b"\x89PNG")


def test_a_start_that_fails_leaves_no_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pictures = picture_folder(tmp_path / "pictures")
    (pictures / "train" / "a" / "000.png").write_bytes(b"no picture")
    for words in ([], ["--out", tmp_path / "mine"]):
        assert "000.png" in error_of([*RUN, "--data", pictures, *words], capsys)
    assert not (tmp_path / "mine").exists() and not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "", ".", "a b"])
def test_the_name_of_a_config_stays_inside_of_runs(tmp_path, capsys, name):
    fields = json.dumps(vars(TINY) | {"name": name})
    (tmp_path / "mine.json").write_text(fields)
    said = error_of(["train", "--config", tmp_path / "mine.json", "--data", "sample"], capsys)
    assert f"name = {name!r}" in said


def test_the_record_keeps_no_absolute_path(tmp_path, monkeypatch):
    words = ["/home/me/secret/bin/rotvq", "train", "--data", "/home/me/secret/pictures"]
    words += ["--out=~/secret/run", "C:\\secret\\x", "--lr", "1e-3", "-x=a/b"]
    assert records.command_line(words) == "rotvq train --data pictures --out=run x --lr 1e-3 -x=a/b"
    monkeypatch.setattr(sys, "argv", words)
    pictures = picture_folder(tmp_path / "secret")
    out = tmp_path / "run"
    assert main([*RUN, "--batch", "4", "--data", str(pictures), "--out", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    for file in ("run.json", "config.json", "metrics.jsonl", "report.html"):
        assert (
            str(tmp_path) not in (out / file).read_text()
            and "/home/me" not in (out / file).read_text()
        )


# Pictures


@pytest.mark.parametrize("how", ["a link", "renamed", "moved and named by hand"])
def test_pictures_may_move(tmp_path, how):
    real = picture_folder(tmp_path / "somewhere" / "pictures")
    named = tmp_path / "imagenet10"
    named.symlink_to(real)
    out = tmp_path / "run"
    train(TINY, "ste", str(named if how == "a link" else real), out, quiet=True)
    records.states_of(out)[0].unlink()
    words = ["train", "--resume", "--out", str(out)]
    if how != "a link":
        other = tmp_path / ("other" if how == "renamed" else "deep/er")
        other.parent.mkdir(exist_ok=True)
        real.rename(other)
        words += ["--data", str(other)]
    assert main(words) == 0 and len(lines(out / "metrics.jsonl")) == 2
    assert {row["data"] for row in lines(out / "metrics.jsonl")} == {"pictures"}


@pytest.mark.parametrize("remedy", ["removed", "replaced", "another one removed too"])
def test_a_picture_that_breaks_while_streaming_costs_itself_only(
    tmp_path, monkeypatch, capsys, remedy
):
    pictures = picture_folder(tmp_path / "pictures", train=24)
    victim = pictures / "train" / "a" / "005.png"
    whole = victim.read_bytes()
    monkeypatch.setattr(data, "LARGE", 0)
    step_that(monkeypatch, 2, lambda: victim.write_bytes(whole[:100] + bytes(len(whole) - 100)))
    words = [
        "train",
        "--preset",
        "smoke",
        "--batch",
        "8",
        "--estimators",
        "ste",
        "--save-minutes",
        "0",
    ]
    words += ["--data", pictures, "--out", tmp_path / "run"]
    said = error_of(words, capsys)
    assert str(victim) in said and "Then go on with --resume" in said
    assert records.states_of(tmp_path / "run")
    victim.unlink()
    if remedy == "replaced":
        victim.write_bytes(whole)
    if remedy == "another one removed too":
        (pictures / "train" / "a" / "006.png").unlink()
        said = error_of(["train", "--resume", "--out", tmp_path / "run"], capsys)
        assert "does not hold the pictures" in said
        return
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_crops_of_the_sample_are_not_its_files(finished, tmp_path):
    files = shutil.copytree(SAMPLE.root, tmp_path / "files")
    with pytest.raises(ValueError, match="'sample': .True, False"):
        train(TINY, ("ste", "rotation"), str(files), finished, resume=True, quiet=True)


# Settings


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "linear"},
        {"precision": "float16"},
        {"distance": "manhattan"},
        {"init": "zeros"},
        {"epochs": "3"},
        {"epochs": 2.5},
        {"batch": True},
        {"lr": "fast"},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"lr": -1},
        {"ema": 1.0},
        {"clip": 0},
        {"warmup": 99},
        {"size": 30},
        {"compile": 1},
        {"limit": 0},
        {"micro_batch": 0},
        {"width": 0},
        {"dim": -1},
        {"blocks": -1},
        {"downsamples": 0},
        {"weight_decay": float("inf")},
        {"weight_decay": -1},
        {"decay": 1.5},
        {"commitment": -1},
        {"revive_after": 0},
        {"skip": 1.5},
    ],
    ids=str,
)
def test_values_that_are_none_are_refused_from_wherever_they_come(tmp_path, capsys, changes):
    (name,) = changes
    fields = vars(PRESETS["smoke"]) | changes
    with pytest.raises(ValueError, match=name):
        check_config(Config(**fields))
    with pytest.raises(ValueError, match=name):
        train(Config(**fields), "ste", SAMPLE, tmp_path / "run", quiet=True)
    (tmp_path / "mine.json").write_text(json.dumps(fields))
    said = error_of(["train", "--config", tmp_path / "mine.json", "--data", "sample"], capsys)
    assert "mine.json" in said and name in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [{"keep": 0}, {"save_minutes": -1}, {"save_minutes": float("nan")}], ids=str
)
def test_options_that_make_no_run_are_refused(tmp_path, options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True, **options)
    assert not (tmp_path / "run").exists()


def test_a_preset_of_the_environment_that_is_none(monkeypatch, capsys):
    monkeypatch.setenv("ROTVQ_PRESET", "huge")
    with pytest.raises(ValueError, match="ROTVQ_PRESET is 'huge'; set it to one of"):
        find_preset()
    assert "ROTVQ_PRESET is 'huge'" in error_of(["train", "--data", "sample"], capsys)
    for words in (["--help"], ["train", "--help"], ["eval", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    assert cli.parse(["train", "--preset", "cpu"]).settings == PRESETS["cpu"]


@pytest.mark.parametrize("size", ["-4", "0", "3", "30"])
def test_a_size_that_does_not_fit_the_model_is_not_blamed_on_the_picture(tmp_path, capsys, size):
    picture = next((SAMPLE.root / "val").rglob("*.jpg"))
    said = error_of(["reconstruct", picture, "--size", size, "--out", tmp_path / "x.png"], capsys)
    assert f"--size {size} must be a multiple of 4" in said and picture.name not in said


def test_a_picture_is_not_written_over(tmp_path, capsys):
    noise(1).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    for out in ("a.png", "link.png"):
        said = error_of(["reconstruct", tmp_path / "a.png", "--out", tmp_path / out], capsys)
        assert "would write over a picture" in said
    assert (tmp_path / "a.png").read_bytes() == whole


# Damaged results


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"epoch": 1}\n', "\xff"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json"])
def test_a_report_names_what_is_damaged(copy, capsys, name, text):
    (copy / name).write_text(text, encoding="latin-1")
    assert str(copy / name) in error_of(["report", copy], capsys)


@pytest.mark.parametrize(
    "run",
    [
        "null",
        "[]",
        '{"preset": 3}',
        '{"preset": {"size": 33}}',
        '{"preset": {"size": "big"}}',
        '{"preset": {"size": -4}}',
    ],
)
@pytest.mark.parametrize("verb", ["eval", "reconstruct"])
def test_settings_of_a_model_that_are_damaged_are_named(copy, tmp_path, capsys, run, verb):
    (copy / "ste" / "run.json").write_text(f'{{"run": {run}}}')
    picture = next((SAMPLE.root / "val").rglob("*.jpg"))
    words = ["eval", copy / "ste", "--data", "sample", "--limit", "4"]
    if verb == "reconstruct":
        words = ["reconstruct", picture, "--checkpoint", copy / "ste", "--out", tmp_path / "x.png"]
    if verb == "reconstruct" and "33" in run:  # which does not ask for the size
        assert main([str(word) for word in words]) == 0
        return
    assert str(copy / "ste" / "run.json") in error_of(words, capsys)


# Words


def test_without_a_good_state_nothing_is_said_of_one(tmp_path, monkeypatch):
    losses_become(monkeypatch, float("nan"))
    with pytest.raises(FloatingPointError, match="None is saved"):
        train(TINY, "ste", SAMPLE, tmp_path / "a", quiet=True)
    monkeypatch.undo()
    train(TINY, "ste", SAMPLE, tmp_path / "b", quiet=True)
    records.states_of(tmp_path / "b")[0].unlink()
    losses_become(monkeypatch, float("nan"))
    with pytest.raises(FloatingPointError, match="The last good state is .*00001-0000000.pt"):
        train(TINY, "ste", SAMPLE, tmp_path / "b", resume=True, quiet=True)


def test_threads_that_wait_for_one_another_are_named_when_it_is_seen(monkeypatch):
    monkeypatch.setattr(records.torch, "get_num_threads", lambda: 8)
    assert "had a processor for 30% of the time" in records.starved(20, 6)
    assert "OMP_NUM_THREADS=1" in records.starved(20, 6)
    assert (
        records.starved(20, 19) == "" == records.starved(5, 1)
    )  # nearly all of it; too early to say
    monkeypatch.setattr(records.torch, "get_num_threads", lambda: 1)
    assert records.starved(20, 6) == ""  # its fair share


def test_it_is_said_once_in_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "starved", lambda seconds, own: "they wait")
    train(PRESETS["smoke"], "ste", SAMPLE, tmp_path / "run", quiet=True)
    assert capsys.readouterr().err.count("they wait") == 1


def test_a_stopwatch_knows_the_time_of_its_own_thread():
    watch = training.Stopwatch(CPU)
    with watch:
        time.sleep(0.2)
    asleep = watch.own
    with watch:
        begun = time.process_time()
        while time.process_time() - begun < 0.2:
            pass
    assert asleep < 0.1 and watch.own - asleep > 0.15


# Signals


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="has no SIGHUP")
def test_a_closed_terminal_saves_and_one_that_is_ignored_does_not_matter(
    tmp_path, monkeypatch, usual_signals
):
    step_that(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
    words = ["train", "--preset", "smoke", "--estimators", "ste", "--data", "sample", "--out"]
    assert main([*words, str(tmp_path / "a")]) == 128 + signal.SIGHUP
    assert records.load_state(tmp_path / "a")["step"] == 2
    monkeypatch.undo()
    step_that(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert main([*words, str(tmp_path / "b")]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert main(["train", "--resume", "--out", str(tmp_path / "a")]) == 0
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_an_error_that_is_about_a_picture_says_which():
    assert DataError("x").file is None
    with pytest.raises(DataError) as error:
        data.decode_picture(Path("nowhere.png"), 8)
    assert error.value.file == Path("nowhere.png")
