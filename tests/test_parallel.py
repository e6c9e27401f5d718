"""The layer inside DDP (buffer broadcast, several forwards, uneven steps under Join) and FSDP2, two
processes over gloo."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.testing import assert_close

from rotvq import VectorQuantizer, learn_after

pytestmark = pytest.mark.slow

WORLD = 2
DIVIDES = (
    torch.__version__ >= "2.13"
)  # FSDP2 on a CPU: 2.6 has none, 2.7 and 2.8 add where they should average
needs_fsdp2 = pytest.mark.skipif(not DIVIDES, reason="this PyTorch has no right FSDP2 on a CPU")


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.vq = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            VectorQuantizer(6, 24, init="normal", **options),
        )

    def forward(self, x):
        q, _, loss = self.vq(self.before(x))
        return self.after(q.relu()).square().mean() + loss


def batch(step, rank, n=40):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(100 * step + rank))


def joint(step):
    return torch.cat([batch(step, rank) for rank in range(WORLD)])


def train(net, batches, forwards=1, told=False, look=None):
    "`told`: the codes learn after each step of the optimizer; `look` is called before each."
    opt = torch.optim.SGD(net.parameters(), 0.05)
    if told:
        learn_after(net, opt)
    for x in batches:
        opt.zero_grad()
        sum(net(part) for part in x.chunk(forwards)).div(forwards).backward()
        if look:
            look()
        opt.step()
        if look:
            look()


def whole(state):
    return {
        k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone()
        for k, v in state.items()
    }


def in_ddp(rank, forwards=1, told=False, first_looks=False, **options):
    net, chosen, saved = Net(**options), [], []
    net.vq.register_forward_hook(lambda vq, args, out: chosen.append(out.indices))

    def look():  # evaluate and save in the first process alone
        net.eval()(batch(9, 0)), saved.append(whole(net.state_dict())), net.vq.usage(), net.train()

    train(
        DDP(net),
        [batch(k, rank) for k in range(4)],
        forwards,
        told,
        look if first_looks and rank == 0 else None,
    )
    return whole(net.state_dict()), chosen[-1]


def uneven(rank):
    """Three steps here, five there; the codebooks learn by themselves, so that no one waits for a
    process that has finished."""
    net = DDP(Net(sync=False), broadcast_buffers=False)
    with Join([net]):
        train(net, [batch(k, rank) for k in range(3 + 2 * rank)])
    return {k: v.detach().clone() for k, v in net.module.named_parameters()} | {
        "batches": net.module.vq.batches.clone()
    }


def in_fsdp(rank, told=False, **options):
    net = Net(**options)
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    train(net, [batch(k, rank) for k in range(4)], told=told)
    vq, z = net.vq, batch(9, 0)
    seen = {
        "divided": isinstance(vq.codebook, DTensor),
        "state": whole(net.state_dict()),
        "indices": vq.encode(z),
        "usage": vq.diagnose(z).usage,
        "decoded": vq.decode(vq.encode(z)).detach(),
    }
    vq.kmeans_init(joint(9), generator=torch.Generator().manual_seed(0))
    return seen | {"placed": whole({"codebook": vq.codebook})["codebook"]}


def in_fsdp_with_revival(rank, told):
    """How many codes are on vectors of a batch far away, after all have been revived there by a
    training step."""
    net = Net(learnable=True, revive_after=1)
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    opt = torch.optim.SGD(net.parameters(), 0.0)
    if told:
        learn_after(net, opt)
    net.vq.waited.fill_(5)
    for _ in range(2):
        try:
            net(batch(0, rank) + 100).backward()
        except RuntimeError as error:
            return str(error)
        opt.step()
    return (whole({"codebook": net.vq.codebook})["codebook"].abs().amax(1) > 10).sum()


def revived_together(rank):
    """The codes after all were revived, two forward passes before the step; each process has
    vectors of its own, the last one none in the second."""
    vq = VectorQuantizer(1, 64, revive_after=1)
    vq.learn()
    vq.waited.fill_(5)
    (
        vq(torch.arange(100.0).view(-1, 1) + 1000 * (rank + 1)),
        vq(torch.zeros(0 if rank else 3, 1) + 7000),
    )
    vq.learn()
    return vq.codebook[vq.idle > 0, 0]  # but for those that were chosen


TWICE = {"forwards": 2}
DDP_OPTIONS = {
    "ddp": {},
    "ddp learnable": {"learnable": True},
    "ddp revival": {"revive_after": 1},
    "ddp cosine": {"distance": "cosine"},
    "two forwards": TWICE,
}
DDP_OPTIONS |= {
    f"{name}, told": options | {"told": True}
    for name, options in DDP_OPTIONS.items()
    if "revival" not in name
}
DDP_OPTIONS |= {
    f"{name}, the first looks": options | {"first_looks": True}
    for name, options in DDP_OPTIONS.items()
}


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    found = {name: in_ddp(rank, **options) for name, options in DDP_OPTIONS.items()}
    found |= {
        "apart": in_ddp(rank, sync=False),
        "uneven": uneven(rank),
        "revived together": revived_together(rank),
    }
    if DIVIDES:
        found |= {
            "fsdp": in_fsdp(rank),
            "fsdp learnable": in_fsdp(rank, learnable=True),
            "fsdp told": in_fsdp(rank, told=True),
            "fsdp learnable told": in_fsdp(rank, told=True, learnable=True),
        }
        found["fsdp revival"] = [in_fsdp_with_revival(rank, told) for told in (False, True)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    mp.start_processes(process, (str(folder),), nprocs=WORLD, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def alone(forwards=1, told=False, first_looks=False, **options):
    net = Net(**options)
    if forwards == 1:
        train(net, [joint(k) for k in range(4)], told=told)
    else:
        train(
            net,
            [
                torch.cat([batch(k, r).chunk(2)[part] for part in range(2) for r in range(WORLD)])
                for k in range(4)
            ],
            forwards,
            told,
        )
    return net


@pytest.mark.parametrize("name", DDP_OPTIONS)
def test_ddp_learns_what_one_process_would(found, name):
    """DDP broadcasts the buffers of the first process before each forward: also those of one that
    has evaluated, and learned, before the others."""
    expected = alone(**DDP_OPTIONS[name]).state_dict()
    for state in found:
        assert_close(state[name][0], whole(expected), rtol=1e-4, atol=1e-5)


def test_codes_are_revived_on_the_vectors_of_all_processes_when_they_meet(found):
    first, second = (state["revived together"] for state in found)
    assert torch.equal(first, second)
    assert (first < 0).sum() == 0 and {int(code) // 1000 for code in first} == {
        7,
        2,
    }  # of the latest pass with vectors, in each process
    assert 20 < (first < 3000).sum() < 44 and len(first[first < 3000].unique()) > 15


def test_without_sync_ddp_broadcasts_the_codebook_of_the_first_process(found):
    """`sync=False` wants `broadcast_buffers=False` beside it: else what the others learn is
    overwritten before every step."""
    (first, _), (second, _) = (state["apart"] for state in found)
    assert not torch.equal(
        first["vq.book.codes"], second["vq.book.codes"]
    )  # each has learned alone in the last step,
    counts = [
        (state["vq.book.counts"] - 0.2 * chosen.bincount(minlength=24)) / 0.8
        for state, chosen in (state["apart"] for state in found)
    ]
    assert_close(*counts)  # but began it with the counts of the first process


def test_uneven_steps_under_join(found):
    for name in found[0]["uneven"].keys() - {"batches"}:
        assert_close(found[0]["uneven"][name], found[1]["uneven"][name])
    assert [state["uneven"]["batches"].item() for state in found] == [3, 5]


@needs_fsdp2
@pytest.mark.parametrize(
    "name, options",
    [
        ("fsdp", {}),
        ("fsdp learnable", {"learnable": True}),
        ("fsdp told", {"told": True}),
        ("fsdp learnable told", {"learnable": True, "told": True}),
    ],
)
def test_fsdp2_learns_what_one_process_would(found, name, options):
    net = alone(**options)
    z, expected = batch(9, 0), whole(net.state_dict())
    indices, usage = net.vq.encode(z), net.vq.diagnose(z).usage
    decoded = net.vq.decode(indices).detach()
    net.vq.kmeans_init([joint(9), joint(9)], generator=torch.Generator().manual_seed(0))
    for state in found:
        seen = state[name]
        assert seen["divided"] == ("learnable" in options)
        assert_close(seen["state"], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(seen["indices"], indices) and seen["usage"] == usage
        assert_close(seen["decoded"], decoded, rtol=1e-4, atol=1e-5)
        assert_close(seen["placed"], net.vq.codebook.detach(), rtol=1e-4, atol=1e-5)


@needs_fsdp2
def test_fsdp2_keeps_what_is_revived_after_a_step(found):
    "It throws away what is written in a forward pass, so by itself the layer refuses."
    for state in found:
        assert (
            "learn_after" in state["fsdp revival"][0] and state["fsdp revival"][1] >= 23
        )  # one was in use
