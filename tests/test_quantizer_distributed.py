"""Several processes against one with the joint batch, over gloo."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from rotvq import ProductVQ, ResidualVQ, VectorQuantizer

pytestmark = pytest.mark.slow

OPTIONS = {
    "plain": {},
    "cosine": {"distance": "cosine"},
    "k-means": {"init": "kmeans"},
    "revival": {"revive_after": 2},
    "all": {"init": "kmeans", "revive_after": 1, "distance": "cosine"},
    "learnable": {"learnable": True, "revive_after": 2},
    "the rule": {"estimator": "rotation-until-used"},
    "heads": {"make": lambda **o: VectorQuantizer(6, 24, codebook_dim=3, heads=2, **o)},
    "parts": {"make": lambda **o: ProductVQ(6, 24, 2, **o), "revive_after": 2},
    "stack": {"make": lambda **o: ResidualVQ(6, 24, 3, **o)},
    "stack, revival": {
        "make": lambda **o: ResidualVQ(6, 24, 3, **o),
        "init": "kmeans",
        "revive_after": 2,
    },
    "stack, one codebook": {"make": lambda **o: ResidualVQ(6, 24, 3, shared_codebook=True, **o)},
}
SIZES = [37, 64, 5]  # vectors of each process
STEPS = 20


def batches(rank: int | None, world: int):
    """The batches of a process, or of all (`None`) together; the last ones are uneven, with
    padding, an empty and a spoilt one."""
    gen = torch.Generator().manual_seed(7)
    for step in range(STEPS):
        parts = [
            torch.randn(SIZES[r] if step > STEPS - 5 else 48, 6, generator=gen)
            for r in range(world)
        ]
        masks = [
            torch.rand(len(part), generator=gen) < (0.7 if step % 3 else 1.1) for part in parts
        ]
        if step == STEPS - 2:
            parts[-1], masks[-1] = parts[-1][:0], masks[-1][:0]
        if step == STEPS - 4:
            parts[0][0, 0], masks[0][0] = torch.nan, True
        yield (torch.cat(parts), torch.cat(masks)) if rank is None else (parts[rank], masks[rank])


def run(rank: int | None, world: int, options: dict) -> dict:
    torch.manual_seed(0 if rank is None else rank)  # the first process decides what is random
    options = dict(options)
    layer = options.pop("make", lambda **o: VectorQuantizer(6, 24, **o))(
        channel_first=False, **options
    )
    by_hand, indices = getattr(layer, "shared_codebook", False), []
    if by_hand:
        layer.learn()
    for z, mask in batches(rank, world):
        indices.append(layer(z, mask).indices)
        if by_hand:
            layer.learn()
    return {k: v.detach() for k, v in layer.state_dict().items()} | {"chosen": torch.cat(indices)}


def process(rank: int, world: int, port: int, folder: str):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(
        {name: run(rank, world, options) for name, options in OPTIONS.items()},
        f"{folder}/{rank}.pt",
    )
    torch.manual_seed(rank)
    resumed = VectorQuantizer(6, 24, init="kmeans")  # only the first process has loaded something
    if rank == 0:
        resumed.load_state_dict(VectorQuantizer(6, 24).state_dict())
    z = torch.randn(40, 6)
    resumed(z)
    compiled = VectorQuantizer(6, 24, revive_after=2)
    compiled.learn()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        step(torch.randn(40, 6)), compiled.learn()
    torch.manual_seed(
        rank
    )  # another start in each process, and codes placed before the first batch
    placed = VectorQuantizer(6, 24, revive_after=1)
    placed.kmeans_init(torch.randn(40, 6))
    for _ in range(4):
        placed(torch.randn(10, 6))
    if rank == 0:
        placed.load_state_dict(
            placed.state_dict()
        )  # in the first process alone: nobody waits for the others
    placed(torch.randn(10, 6))
    nets = {"resumed": resumed, "compiled": compiled, "placed": placed}
    torch.save({name: net.state_dict() for name, net in nets.items()}, f"{folder}/more-{rank}.pt")
    apart = VectorQuantizer(6, 24, sync=False)
    torch.manual_seed(rank)
    for _ in range(rank + 1):
        apart(torch.randn(10, 6))  # waits for nobody: other numbers of steps
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    "Of three processes; a run has two, in test_training_parallel.py."
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(process, (3, port, str(folder)), nprocs=3, start_method="spawn")
    return [
        torch.load(folder / f"{rank}.pt") | {"more": torch.load(folder / f"more-{rank}.pt")}
        for rank in range(3)
    ]


@pytest.mark.parametrize("options", OPTIONS)
def test_processes_learn_what_one_would_learn_from_the_joint_batch(states, options):
    alone = run(None, len(states), OPTIONS[options])
    for state in states:
        for name in alone.keys() - {"chosen"}:
            assert_close(
                state[options][name],
                alone[name],
                rtol=1e-4,
                atol=1e-5,
                msg=lambda m: f"{name}: {m}",
            )
        for name in alone.keys() - {"chosen"}:
            assert torch.equal(state[options][name], states[0][options][name])
    chosen = torch.cat([state[options]["chosen"] for state in states])
    assert torch.equal(chosen.sort(0).values, alone["chosen"].sort(0).values)


@pytest.mark.parametrize("kind", ["resumed", "compiled", "placed"])
def test_processes_agree(states, kind):
    "Also where only the first one loaded a state, and inside a compiled graph."
    for name, value in states[0]["more"][kind].items():
        assert all(torch.equal(state["more"][kind][name], value) for state in states[1:]), name
    assert states[0]["more"][kind]["book.counts"].std() > 0.1
