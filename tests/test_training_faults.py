"""What can happen to a run: killed at any moment, asked to stop, damaged or foreign states, full
disks, vanished pictures, numbers that are none."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import rotvq.run.model as model
import rotvq.run.records as records
import rotvq.run.training as training
from helpers import TIMES, TINY, lines, losses_become, same_weights
from rotvq import VQVAE
from rotvq.cli import main
from rotvq.run.data import SAMPLE, ImageNet10, Source
from rotvq.run.training import PRESETS, Learner, batches, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def state_of(out: Path):
    return VQVAE.from_pretrained(out).state_dict()


def figures(run):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in run.rows]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(tmp_path):
    """SIGKILL again and again, often in the middle of a write: the same weights, averages, metrics
    and curves, bit for bit."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killer.py")), str(tmp_path / "killed"), "0"],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["exit"] == 0, done.stderr
    assert report["kills"] >= 5 and report["half_written"] >= 1
    alone = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import sys, torch; torch.set_num_threads(1); sys.path.insert(0,"
                f" {str(Path(__file__).parent)!r}); import killer; from rotvq.run.training import"
                " train\ntrain(killer.CONFIG, killer.ESTIMATORS, 'sample',"
                f" {str(tmp_path / 'alone')!r}, quiet=True)"
            ),
        ],
        env=env,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    for name in ("ste", "rotation-then-ste"):
        assert same_weights(tmp_path / "killed" / name, tmp_path / "alone" / name), name
    drop = lambda file: [{k: v for k, v in row.items() if k not in TIMES} for row in lines(file)]
    for name in ("metrics.jsonl", "steps.jsonl"):
        assert drop(tmp_path / "killed" / name) == drop(tmp_path / "alone" / name)
    a, b = (records.load_state(tmp_path / name)["learners"] for name in ("killed", "alone"))
    for name in a:
        assert all(
            torch.equal(a[name]["average"][k], b[name]["average"][k]) for k in b[name]["average"]
        )
        for i, held in b[name]["opt"]["state"].items():
            assert all(torch.equal(held[k], a[name]["opt"]["state"][i][k]) for k in held)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM), signal.SIGINT]
)
def test_asked_to_stop_it_saves_in_the_middle_of_an_epoch(
    tmp_path, monkeypatch, capsys, usual_signals, number
):
    real, calls = Learner.step, []

    def step(self, x, lr=None):
        calls.append(1)
        if len(calls) == 11:
            os.kill(os.getpid(), number)  # `smoke` has eight steps in an epoch
        return real(self, x, lr)

    monkeypatch.setattr(Learner, "step", step)
    before = signal.getsignal(number)
    out = tmp_path / "a run"
    assert main(
        ["train", "--preset", "smoke", "--estimators", "ste", "--data", "sample", "--out", str(out)]
    ) == (130 if number == signal.SIGINT else 128 + number)
    assert signal.getsignal(number) == before
    state = records.load_state(out)
    assert (state["epoch"], state["step"]) == (1, 3) and len(calls) == 11
    said = capsys.readouterr().err
    monkeypatch.undo()
    if number == signal.SIGINT:  # the line that it prints works as it stands, from anywhere
        command = shlex.split(said.split("continue with: ")[1])
        env = {k: v for k, v in os.environ.items() if k not in ("ROTVQ_DATA", "ROTVQ_PRESET")}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        assert main(["train", "--resume", "--out", str(out)]) == 0
    train("smoke", "ste", "sample", tmp_path / "whole", quiet=True)
    if number != signal.SIGINT:
        assert same_weights(out, tmp_path / "whole")
    assert len(lines(out / "metrics.jsonl")) == 2


def test_states_inside_an_epoch_come_every_few_minutes(tmp_path):
    train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True, save_minutes=0, keep=4)
    assert [file.name for file in records.states_of(tmp_path / "run")] == [
        "00002-0000000.pt",
        "00001-0000003.pt",
        "00001-0000002.pt",
        "00001-0000001.pt",
    ]
    train(TINY, "ste", SAMPLE, tmp_path / "other", quiet=True)
    assert [file.name for file in records.states_of(tmp_path / "other")] == [
        "00002-0000000.pt",
        "00001-0000000.pt",
    ]


def spoil(file: Path, how: str):
    whole = file.read_bytes()
    if how == "empty":
        file.write_bytes(b"")
    if how == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    if how == "flipped":
        file.write_bytes(
            whole[: len(whole) // 2]
            + bytes([whole[len(whole) // 2] ^ 4])
            + whole[len(whole) // 2 + 1 :]
        )
    if how == "foreign":
        torch.save({"weights": torch.zeros(3)}, file)
    if how == "future":
        torch.save({"format": records.FORMAT + 1, "config": "{}", "rows": "[]"}, file)
    if how == "code":
        torch.save({"format": records.FORMAT, "config": print}, file)


@pytest.mark.parametrize(
    "how, words",
    [
        ("empty", "BadZipFile"),
        ("truncated", "BadZipFile"),
        ("flipped", "wrong checksum"),
        ("foreign", "not a state of rotvq"),
        ("future", "newer rotvq"),
        ("code", "Unpickling"),
    ],
)
def test_a_state_that_cannot_be_read_is_passed_over(tmp_path, capsys, how, words):
    """The one before is used and the run ends the same; with none left there is an error that names
    the file."""
    train(TINY, "ste", SAMPLE, tmp_path / "whole", quiet=True)
    train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True, save_minutes=0)
    out = tmp_path / "run"
    newest, *older = records.states_of(out)
    newest.unlink()
    newest, *older = older
    spoil(newest, how)
    resumed = train(TINY, "ste", SAMPLE, out, resume=True, quiet=True)
    said = capsys.readouterr().err
    assert newest.name in said and words in said and "the one before" in said
    assert same_weights(out, tmp_path / "whole") and len(resumed.rows) == 2
    for file in records.states_of(out):
        spoil(file, "truncated" if how == "flipped" else how)  # flipped again, a bit is right
    assert main(["train", "--resume", "--out", str(out)]) == 1
    assert "No state in" in capsys.readouterr().err


def test_the_state_of_another_version_is_refused_with_the_remedy(tmp_path):
    "What rotvq 0.0.3 wrote has the format before this one; the run is left as it was."
    train(TINY, "ste", SAMPLE, tmp_path, quiet=True)
    for file in records.states_of(tmp_path):
        torch.save(torch.load(file) | {"format": 2}, file)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(
        ValueError, match="finish the run with the older rotvq.*or choose another folder"
    ):
        train(TINY, "ste", SAMPLE, tmp_path, resume=True, quiet=True)
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_run_is_never_overwritten(tmp_path):
    train(TINY, ("ste",), SAMPLE, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="--resume"):
        train(TINY, ("ste",), SAMPLE, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="seed"):
        train(TINY, ("ste",), SAMPLE, tmp_path / "run", seed=1, resume=True, quiet=True)
    with pytest.raises(ValueError, match="'lr': .0.0003, 0.1"):
        train(
            dataclasses.replace(TINY, lr=0.1),
            ("ste",),
            SAMPLE,
            tmp_path / "run",
            resume=True,
            quiet=True,
        )
    with pytest.raises(ValueError, match="no run to resume"):
        train(TINY, ("ste",), SAMPLE, tmp_path / "none", resume=True, quiet=True)
    assert not (tmp_path / "none").exists()


# Numbers that are none


def test_a_loss_that_is_no_number_names_its_step_and_keeps_the_batch(tmp_path, monkeypatch):
    """The step is between two looks; the state before stays, and goes on to the end once the cause
    is gone."""
    real, calls = Learner.step, []

    def step(self, x, lr=None):
        calls.append(1)
        mse, counts = real(self, x, lr)
        return (
            mse * float("nan") if len(calls) == 10 else mse
        ), counts  # the second step of the second epoch

    monkeypatch.setattr(Learner, "step", step)
    with pytest.raises(FloatingPointError, match="epoch 2/2, step 2.*--lr"):
        train("smoke", "ste", SAMPLE, tmp_path / "run", quiet=True)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    held = torch.load(tmp_path / "run" / "diverged.pt", weights_only=True)
    smoke = PRESETS["smoke"]
    images = ImageNet10("train", smoke.size, SAMPLE, smoke.limit).images
    assert (held["epoch"], held["step"]) == (1, 1) and torch.equal(
        held["pictures"], next(batches(images, smoke, 0, 1, start=1))
    )
    assert records.load_state(tmp_path / "run")["epoch"] == 1
    monkeypatch.undo()
    assert len(train("smoke", "ste", SAMPLE, tmp_path / "run", resume=True, quiet=True).rows) == 2


def test_a_state_that_is_due_is_not_written_after_a_loss_that_is_no_number(tmp_path, monkeypatch):
    losses_become(monkeypatch, float("inf"))
    with pytest.raises(FloatingPointError, match="step 1"):
        train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True, save_minutes=0)
    assert not records.states_of(tmp_path / "run")


def test_a_validation_that_is_no_number_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        training,
        "evaluate",
        lambda *args, **options: {
            "mse": float("nan"),
            "quantization_error": 1.0,
            "relative_error": 1.0,
        },
    )
    with pytest.raises(FloatingPointError, match="validation after epoch 1"):
        train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "model.safetensors").exists() and not records.states_of(
        tmp_path / "run"
    )


def test_a_gradient_that_is_no_number_is_noticed_before_it_is_saved(tmp_path, monkeypatch):
    "The loss of the step is finite, its weights are not any more; a state is due after every step."
    real, calls = Learner.losses, []

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    def losses(self, x):
        calls.append(1)
        mse, *rest = real(self, x)
        return (Spoilt.apply(mse) if len(calls) == 3 else mse), *rest

    monkeypatch.setattr(Learner, "losses", losses)
    with pytest.raises(FloatingPointError, match="step 3"):
        train("smoke", "ste", SAMPLE, tmp_path / "run", quiet=True, save_minutes=0)
    assert records.load_state(tmp_path / "run")["step"] == 2
    assert all(
        value.isfinite().all()
        for value in records.load_state(tmp_path / "run")["learners"]["ste"]["model"].values()
    )


def test_a_run_goes_on_with_smaller_micro_batches(tmp_path):
    "What the message about memory says."
    train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
    records.states_of(tmp_path / "run")[0].unlink()
    assert (
        len(
            train(
                dataclasses.replace(TINY, micro_batch=4),
                "ste",
                SAMPLE,
                tmp_path / "run",
                resume=True,
                quiet=True,
            ).rows
        )
        == 2
    )


def test_other_pictures_of_the_same_name_are_not_the_same_run(tmp_path):
    shutil.copytree(SAMPLE.root, tmp_path / "pictures")
    train(TINY, "ste", str(tmp_path / "pictures"), tmp_path / "run", quiet=True)
    picture = next((tmp_path / "pictures" / "train").rglob("*.jpg"))
    picture.write_bytes(picture.read_bytes() + b"x")
    with pytest.raises(ValueError, match="does not hold the pictures"):
        train(TINY, "ste", str(tmp_path / "pictures"), tmp_path / "run", resume=True, quiet=True)


def test_a_damaged_newest_state_does_not_push_out_what_is_written_after_it(tmp_path):
    train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True, save_minutes=0)
    newest = records.states_of(tmp_path / "run")[0]
    newest.write_bytes(b"")
    os.utime(newest, (1, 1))
    state = records.load_state(tmp_path / "run")
    for file in records.states_of(tmp_path / "run")[1:]:
        file.unlink()
    record = (
        {key: state[key] for key in ("epoch", "step", "sums", "random", "learners")}
        | {key: json.dumps(state[key]) for key in ("config", "rows")}
        | {"record": state["record"]}
    )
    written = records.write_state(tmp_path / "run", record, keep=1)
    assert written.exists() and records.load_state(tmp_path / "run")["step"] == state["step"]


# What can happen to a folder


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(tmp_path):
    "The second one is told so; a lock whose process was killed holds nobody back."
    code = (
        "import sys, time; from rotvq.run.records import alone_in; from pathlib import Path\n"
        "with alone_in(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="Another process is training"):
            train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
        assert {p.name for p in (tmp_path / "run").iterdir()} <= {".lock"}
        child.send_signal(signal.SIGKILL)
        child.wait()
        train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert {
        "config.json",
        "run.json",
        "metrics.jsonl",
        "model.safetensors",
        "states",
        "steps.jsonl",
    } <= {p.name for p in (tmp_path / "run").iterdir()}


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert (
        main(
            [
                "train",
                "--preset",
                "smoke",
                "--data",
                "sample",
                "--out",
                str(tmp_path / "file" / "run"),
            ]
        )
        == 1
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Cannot write to" in said and "--out" in said


def test_pictures_that_have_vanished_are_named(tmp_path, capsys):
    shutil.copytree(SAMPLE.root, tmp_path / "pictures")
    train(TINY, "ste", str(tmp_path / "pictures"), tmp_path / "run", quiet=True)
    shutil.rmtree(tmp_path / "pictures")
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "pictures") in said and said.count("\n") == 1
    assert (
        main(["train", "--resume", "--out", str(tmp_path / "run"), "--data", str(SAMPLE.root)]) == 1
    )  # other pictures are not the same run
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full to write to")
@pytest.mark.parametrize("name", ["states", "model.safetensors", "metrics.jsonl"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, capsys, monkeypatch, name):
    arguments = [
        "train",
        "--preset",
        "smoke",
        "--estimators",
        "ste",
        "--data",
        "sample",
        "--out",
        str(tmp_path / "run"),
    ]
    real, calls = training.run_epoch, []

    def epoch(*args):
        calls.append(1)
        if len(calls) == 2:  # the second epoch finds the disk full
            if name == "model.safetensors":
                monkeypatch.setattr(model, "save_file", no_space)
            if name == "metrics.jsonl":
                (tmp_path / "run" / f".{name}").symlink_to("/dev/full")
            if name == "states":
                monkeypatch.setattr(
                    records.torch, "save", lambda state, file: no_space(state, file)
                )
        return real(*args)

    def no_space(tensors, file):  # safetensors replaces a link
        file.write_bytes(b"half of it")
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(training, "run_epoch", epoch)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith("rotvq: ")
        and said.count("\n") == 1
        and "cannot be written" in said
        and (name in said or name == "states" and "00002-0000000.pt" in said)
    )
    assert not [p for p in (tmp_path / "run").rglob(".*") if p.name != ".lock"]
    assert records.load_state(tmp_path / "run")["epoch"] == 1
    monkeypatch.undo()
    assert main([*arguments, "--resume"]) == 0  # there is room again
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_the_fingerprint_of_the_pictures_is_theirs(tmp_path):
    shutil.copytree(SAMPLE.root, tmp_path / "pictures")
    here, there = (
        records.data_fingerprint(SAMPLE),
        records.data_fingerprint(Source(tmp_path / "pictures", "copy")),
    )
    assert here == there  # wherever it lies
    picture = next((tmp_path / "pictures" / "val").rglob("*.jpg"))
    picture.write_bytes(picture.read_bytes() + b"x")
    assert records.data_fingerprint(Source(tmp_path / "pictures", "copy")) != here


def test_a_commit_is_recorded_only_of_the_clone_that_keeps_the_files(tmp_path):
    "An environment inside another project's clone lies in that clone, and is none of it."
    git = lambda *words: subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *words],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    inside, kept = tmp_path / ".venv" / "rotvq", tmp_path / "rotvq"
    for folder in (inside, kept):
        folder.mkdir(parents=True), (folder / "__init__.py").write_text("")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git("init", "-q"), git("add", "."), git("commit", "-qm", "x")
    head = git("rev-parse", "--short=12", "HEAD")
    assert (
        records.commit_of(kept) == head
        and records.commit_of(inside) is None
        and records.commit_of(tmp_path.parent / "nothing") is None
    )
    (kept / "__init__.py").write_text("1")
    assert records.commit_of(kept) == head + "+"


@pytest.mark.parametrize("kind", ["a link to nothing", "a file"])
def test_runs_that_is_no_folder_is_named(tmp_path, kind):
    from rotvq.cli import new_folder

    held = tmp_path / "runs"
    held.symlink_to(tmp_path / "gone") if kind == "a link to nothing" else held.write_text("")
    with pytest.raises(OSError, match="runs"):
        new_folder(held / "a")
    held.unlink()
    assert [new_folder(held / "a").name for _ in range(3)] == ["a", "a-2", "a-3"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_for_whom_the_umask_says(tmp_path, umask, mode):
    from rotvq.run.data import decode_all

    before = os.umask(umask)
    try:
        VQVAE(8, 4, 16, 2, 1).save_pretrained(tmp_path / "model")
        decode_all(
            [0, 1], lambda job: np.zeros((3, 4, 4), np.uint8), 4, tmp_path / "cache" / "a.npy"
        )
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) >= 3 and {p.stat().st_mode & 0o777 for p in files} == {mode}, {
        p.name: oct(p.stat().st_mode) for p in files
    }
