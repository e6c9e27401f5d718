"""The training engine: equal conditions, what a step does in any way of taking it, evaluation,
schedule, and what a run records."""

import copy
import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close

import rotvq.run.training as training
from helpers import CPU, METRICS, TINY
from rotvq import VQVAE
from rotvq.codebook import perplexity, usage
from rotvq.run.data import SAMPLE, ImageNet10, fetch
from rotvq.run.graphs import Replayed
from rotvq.run.metrics import psnr
from rotvq.run.training import (
    PRESETS,
    Config,
    Learner,
    batches,
    check_config,
    evaluate,
    find_preset,
    order_of,
    rate,
    to_float,
    train,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_estimators_start_alike_and_see_the_same_batches():
    torch.manual_seed(123)  # what ran before must not matter
    a, b = (
        Learner(TINY, "ste", 0, torch.device("cpu")),
        Learner(TINY, "rotation", 0, torch.device("cpu")),
    )
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values())
    )
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    (loss_a, counts_a), (loss_b, counts_b) = a.step(x), b.step(x)
    assert torch.equal(loss_a, loss_b) and torch.equal(counts_a, counts_b)
    decoders = [learner.model.decoder.state_dict() for learner in (a, b)]
    assert all(
        torch.equal(x, y) for x, y in zip(*(d.values() for d in decoders))
    )  # the decoder's gradient is the same
    encoders = [learner.model.encoder.state_dict() for learner in (a, b)]
    assert not all(
        torch.equal(x, y) for x, y in zip(*(e.values() for e in encoders))
    )  # the encoder's is not


def test_side_by_side_equals_alone(tmp_path):
    train(TINY, ("ste", "rotation"), SAMPLE, tmp_path / "both", quiet=True)
    train(TINY, ("rotation",), SAMPLE, tmp_path / "alone", quiet=True)
    a, b = (
        VQVAE.from_pretrained(tmp_path / "both" / "rotation"),
        VQVAE.from_pretrained(tmp_path / "alone"),
    )
    for x, y in zip(a.state_dict().values(), b.state_dict().values()):
        assert_close(x, y)


def test_step_runs_on_meta_so_it_never_reads_a_value():
    learner = Learner(TINY, "rotation", 0, torch.device("meta"))
    mse, counts = learner.step(torch.zeros(4, 3, 32, 32, device="meta"))
    assert mse.device.type == "meta" and counts.shape == (TINY.codebook_size,)


@pytest.mark.slow
def test_model_compiles_without_a_graph_break():
    model = VQVAE(16, 8, 32)
    model.quantizer.learn()  # and not by itself, outside the graph
    compiled, x = (
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.rand(2, 3, 16, 16) * 2 - 1,
    )
    out = compiled(x)
    ((out.x_hat - x).square().mean() + out.loss).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("init", ["uniform", "normal", "kmeans"])
def test_every_start_trains_and_is_the_same_for_all_estimators(tmp_path, monkeypatch, init):
    starts, real = [], training.run_epoch

    def look(run, learners, *args):
        starts.extend(learner.model.quantizer.codebook.clone() for learner in learners.values())
        return real(run, learners, *args)

    monkeypatch.setattr(training, "run_epoch", look)
    run = train(
        dataclasses.replace(TINY, init=init, epochs=1),
        ("ste", "rotation"),
        SAMPLE,
        tmp_path / init,
        quiet=True,
    )
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
    assert result["relative_error"] == pytest.approx(
        ((z - q).square().mean() / rows.var(0, correction=0).mean()).item(), rel=1e-4
    )
    counts = torch.bincount(out.indices.flatten(), minlength=32)
    assert set(result) == METRICS and result["images"] == 10
    assert result["mse"] == pytest.approx((out.x_hat - x).square().mean().item(), rel=1e-5)
    assert result["psnr"] == pytest.approx(psnr(result["mse"]))
    assert result["quantization_error"] == pytest.approx((z - q).square().mean().item(), rel=1e-5)
    assert result["usage"] == pytest.approx((counts > 0).double().mean().item())
    p = counts[counts > 0] / counts.sum()
    assert result["perplexity"] == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-5)


@pytest.mark.parametrize(
    "estimators",
    [
        (),
        ("ste", "ste"),
        "nothing",
        "ste-then-nothing",
        "ste-then-rotation-then-ste",
        "rotation-then-ste",
    ],
)
def test_estimators_are_checked(tmp_path, estimators):
    with pytest.raises(ValueError):
        train(TINY, estimators, SAMPLE, tmp_path / "run", quiet=True)


def test_metrics_of_nothing():
    assert usage(torch.zeros(4)) == 0 and perplexity(torch.zeros(4)) == 1


def test_presets(monkeypatch):
    monkeypatch.setenv("ROTVQ_PRESET", "smoke")
    assert find_preset("auto").name == "smoke" and find_preset(TINY) is TINY
    monkeypatch.delenv("ROTVQ_PRESET")
    assert find_preset().name == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="huge"):
        find_preset("huge")


def test_small_sets_make_one_batch():
    assert [
        len(x) for x in batches(torch.zeros(5, 3, 4, 4, dtype=torch.uint8), Config("any"), 0, 0)
    ] == [5]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch": 0}, "batch = 0"),
        ({"lr": float("inf")}, "lr = inf"),
        ({"warmup": 9}, "warmup = 9"),
        ({"size": 30, "downsamples": 3}, "size = 30"),
        ({"ema": 1.0}, "ema = 1.0"),
        ({"micro_batch": 0}, "micro_batch = 0"),
        ({"clip": 0.0}, "clip = 0"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        check_config(dataclasses.replace(TINY, **changes))


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_whole_and_survives_json(name):
    check_config(PRESETS[name])
    assert Config(**json.loads(json.dumps(dataclasses.asdict(PRESETS[name])))) == PRESETS[name]


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu():
    "There the optimizer's rate is a tensor, and its step is fused and can be captured."
    plain, other = (Learner(TINY, "rotation", 0, CPU) for _ in range(2))
    x = torch.rand(4, 3, TINY.size, TINY.size)
    plain.step(x, 1e-3)
    state = copy.deepcopy(plain.state())
    state["opt"]["param_groups"][0] |= {"fused": True, "capturable": True, "lr": torch.tensor(1e-3)}
    other.restore(state)
    for learner in (plain, other):
        learner.step(x, 1e-4)
    for a, b in zip(plain.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b)


def test_what_is_replayed_changes_with_shapes_estimators_and_checkpoints():
    """A step of another shape is taken as it is; another estimator or other tensors of the
    optimizer are captured anew."""
    taken, captured = [], []

    def capture(step):
        captured.append(1)
        held = step()
        return lambda: taken.append("replayed"), held

    config = dataclasses.replace(TINY, switch=1)
    learner = Learner(config, "rotation-then-ste", 0, CPU)
    real = learner.take
    learner.replayed = Replayed(lambda x: taken.append(len(x)) or real(x), capture, warm=2)
    x = torch.rand(4, 3, TINY.size, TINY.size)
    learner.begin(0)
    for _ in range(4):
        learner.step(x)
    assert (
        taken == [4, 4, 4, "replayed", "replayed"] and len(captured) == 1
    )  # two to warm up, the capture, two replays
    learner.step(x[:2])
    assert taken[-1] == 2
    learner.begin(0), learner.step(x)
    assert taken[-1] == "replayed" and len(captured) == 1
    for change in (lambda: learner.begin(1), lambda: learner.restore(learner.state())):
        before = len(captured)
        change()
        for _ in range(3):
            learner.step(x)
        assert taken[-1] == "replayed" and len(captured) == before + 1


def test_the_presets_of_the_paper_are_its_table():
    for name, dim, size, side, seen in [
        ("paper-f8", 32, 1024, 32, 4.0e6),
        ("paper-f4", 3, 8192, 64, 3.2e6),
    ]:
        for config, lr, decay in [
            (PRESETS[name], 5e-5, 0),
            (PRESETS[name + "-cosine"], 1e-4, 1e-4),
        ]:
            assert (config.dim, config.codebook_size, config.size // 2**config.downsamples) == (
                dim,
                size,
                side,
            )
            assert (
                config.lr,
                config.weight_decay,
                config.batch,
                config.decay,
                config.commitment,
                config.clip,
            ) == (lr, decay, 256, 0.8, 1.0, 1.0)
            assert config.epochs * config.epoch_pictures == seen and config.precision == "bfloat16"


# Order and schedule


def test_an_epoch_longer_or_shorter_than_the_set():
    for total, count in [(10, 10), (10, 4), (10, 25)]:
        order, flips = order_of(total, count, 0, 0)
        assert len(order) == len(flips) == count
        for begin in range(0, count, total):
            assert len(set(order[begin : begin + total].tolist())) == min(total, count - begin)
    assert torch.equal(order_of(10, 10, 3, 1)[0], order_of(10, 10, 3, 1)[0]) and not torch.equal(
        order_of(10, 10, 3, 1)[0], order_of(10, 10, 3, 2)[0]
    )


def test_batches_begin_anywhere():
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 2, 2)
    config = Config("eight", batch=8, epoch_pictures=64)
    whole = list(batches(images, config, 1, 2))
    assert len(whole) == 8
    for start in (0, 3, 7, 8):
        for a, b in zip(batches(images, config, 1, 2, start=start), whole[start:], strict=True):
            assert torch.equal(a, b)


def test_rate_rises_stays_and_falls():
    config = Config("any", epochs=10, warmup=2, schedule="cosine", lr=1e-3)
    rates = [rate(config, step, 5) for step in range(50)]
    assert_close(torch.tensor(rates[:10]), torch.arange(1, 11) * 1e-4)
    assert (
        all(a > b for a, b in zip(rates[10:], rates[11:]))
        and rates[10] == 1e-3
        and 0 < rates[-1] < 1e-5
    )
    assert {
        rate(dataclasses.replace(config, schedule="constant", warmup=0), step, 5)
        for step in range(50)
    } == {1e-3}
    assert rate(dataclasses.replace(config, warmup=0.5), 0, 5) == pytest.approx(1e-3 / 2.5)


# Ways of taking the same steps


def losses(steps=5, estimator="rotation", **changes):
    "The reconstruction errors of a few steps, and the learner."
    learner = Learner(dataclasses.replace(TINY, **changes), estimator, 0, CPU)
    images = ImageNet10("train", TINY.size, SAMPLE, 64).images
    config = dataclasses.replace(TINY, batch=32)
    learner.begin(0)
    found = [
        learner.step(x)[0] for epoch in range(steps) for x in batches(images, config, 0, epoch)
    ]
    return torch.stack(found), learner


@pytest.fixture(scope="module")
def plain():
    return losses()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, rtol",
    [
        ({"micro_batch": 8}, 1e-4),
        ({"micro_batch": 12}, 1e-4),
        ({"precision": "bfloat16"}, 3e-2),
        ({"compile": True, "micro_batch": 8}, 1e-4),
    ],
    ids=str,
)
def test_any_way_of_taking_a_step_is_the_same_step(plain, changes, rtol):
    found, learner = losses(**changes)
    assert_close(found, plain[0], rtol=rtol, atol=0)
    a, b = learner.model.quantizer, plain[1].model.quantizer
    assert a.batches == b.batches == 10  # the codebook learns once in a step
    assert_close(a.counts.sum(), b.counts.sum(), rtol=1e-4, atol=0)


def test_all_micro_batches_teach_the_codebook(plain):
    "With a codebook that nobody else moves, the sums of four parts are the sums of the whole."
    whole, parts = (losses(1, micro_batch=m, lr=0.0)[1].model.quantizer for m in (None, 8))
    assert_close(parts.sums, whole.sums, rtol=1e-4, atol=1e-5)
    assert_close(parts.codebook, whole.codebook, rtol=1e-4, atol=1e-5)


def test_averaged_weights_are_what_is_evaluated():
    found, learner = losses(2, ema=0.5)
    weights, average = learner.model.encoder[0].weight, learner.trained.encoder[0].weight
    assert learner.trained is not learner.model and not torch.equal(weights, average)
    assert torch.equal(
        learner.trained.quantizer.codebook, learner.model.quantizer.codebook
    )  # is an average already
    seen, copies = [], Learner(dataclasses.replace(TINY, ema=0.5), "rotation", 0, CPU)
    x = next(
        batches(
            ImageNet10("train", TINY.size, SAMPLE, 64).images,
            dataclasses.replace(TINY, batch=32),
            0,
            0,
        )
    )
    for _ in range(3):
        copies.step(x)
        seen.append(copies.model.encoder[0].weight.detach().clone())
    assert_close(copies.trained.encoder[0].weight, seen[0] * 0.25 + seen[1] * 0.25 + seen[2] * 0.5)


def test_an_estimator_after_another():
    config = dataclasses.replace(TINY, switch=2)
    learner = Learner(config, "rotation-then-ste", 0, CPU)
    used = []
    for epoch in range(4):
        learner.begin(epoch)
        used.append(learner.model.quantizer.estimator_name)
    assert used == ["rotation", "rotation", "ste", "ste"]


def test_the_rule_and_skip_go_on_bit_for_bit(tmp_path):
    """Neither keeps anything beside the codebook's counters: a learner that takes over the state
    makes the same steps."""
    config = dataclasses.replace(TINY, skip=0.3)
    images = ImageNet10("train", TINY.size, SAMPLE, 48).images
    whole, first, second = (Learner(config, "rotation-until-used", 0, CPU) for _ in range(3))
    x = list(batches(images, config, 0, 0)) * 2
    found = [
        [float(learner.step(part)[0]) for part in parts]
        for learner, parts in ((whole, x), (first, x[:4]))
    ]
    weights = first.model.quantizer.rotation_weight()
    second.restore(first.state())
    torch.rand(5)  # no generator is asked
    found[1] += [float(second.step(part)[0]) for part in x[4:]]
    assert found[0] == found[1] and 0 < weights < 1
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values()):
        assert torch.equal(a, b)
    plain = Learner(TINY, "rotation-until-used", 0, CPU)
    assert [float(plain.step(part)[0]) for part in x] != found[0]


def test_streamed_pictures_train_as_held_ones(tmp_path, monkeypatch):
    held = train(TINY, "ste", SAMPLE, tmp_path / "held", quiet=True)
    monkeypatch.setattr("rotvq.run.data.LARGE", 0)
    assert not isinstance(ImageNet10("val", 32, SAMPLE, 8).images, torch.Tensor)
    streamed = train(TINY, "ste", SAMPLE, tmp_path / "streamed", quiet=True)
    assert [row["mse"] for row in held.rows] == [row["mse"] for row in streamed.rows]


def test_an_error_while_streaming_names_the_file(tmp_path):
    class Broken:
        def __len__(self):
            return 4

        def __getitem__(self, indices):
            raise OSError("cannot read four.jpg")

    monkey = fetch(Broken(), [torch.arange(2)] * 3, "cpu")
    with pytest.raises(OSError, match="four.jpg"):
        list(monkey)


# What a run records


def test_the_record_and_the_curves(tmp_path):
    run = train(TINY, "rotation", SAMPLE, tmp_path / "run", quiet=True)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["run"]["seed"] == 0 and about["run"]["preset"] == dataclasses.asdict(TINY)
    assert {"machine", "versions", "commit", "command", "pictures", "started"} <= set(
        about
    ) and "root" not in about["run"]
    assert {"python", "rotvq", "torchvision", "numpy"} <= set(about["versions"]) and about[
        "machine"
    ]["torch"] == torch.__version__
    steps = [
        json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    ]
    assert {"train_mse", "lr", "batch_usage"} <= set(steps[0]) and {"val_mse", "val_usage"} <= set(
        steps[-1]
    )
    assert run.rows[-1]["pictures_per_second"] > 0 and run.rows[-1]["memory_gb"] > 0


def test_tensorboard_reads_what_was_written(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(TINY, ("ste", "rotation"), SAMPLE, tmp_path / "run", quiet=True)
    seen = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train_mse/ste", "lr/rotation", "val_mse/rotation", "val_usage/ste"} <= set(
        seen.Tags()["scalars"]
    )
    assert {"pictures/ste", "pictures/rotation"} <= set(seen.Tags()["images"])
    assert [event.step for event in seen.Scalars("val_mse/ste")] == [2, 5]


@pytest.mark.slow
def test_a_profile_on_request(tmp_path):
    train(
        dataclasses.replace(TINY, limit=256, epochs=1),
        "ste",
        SAMPLE,
        tmp_path / "run",
        quiet=True,
        profile=True,
    )
    assert json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert "convolution" in (tmp_path / "run" / "profile.txt").read_text()


def test_out_of_memory_gets_an_answer(tmp_path, monkeypatch):
    def step(self, x, lr=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Learner, "step", step)
    with pytest.raises(ValueError, match="Not enough memory.*--micro-batch 8"):
        train(TINY, "ste", SAMPLE, tmp_path / "run", quiet=True)
