"""The layer inside DDP (buffer broadcast, several forwards, uneven steps under Join) and FSDP2, two processes over gloo."""
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

from rotvq import VectorQuantizer

WORLD = 2
DIVIDES = torch.__version__ >= "2.13"                                     # FSDP2 on a CPU: 2.6 has none, 2.7 and 2.8 add where they should average
needs_fsdp2 = pytest.mark.skipif(not DIVIDES, reason="this PyTorch has no right FSDP2 on a CPU")


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after, self.vq = nn.Linear(6, 6), nn.Linear(6, 6), VectorQuantizer(6, 24, init="normal", **options)

    def forward(self, x):
        q, _, loss = self.vq(self.before(x))
        return self.after(q.relu()).square().mean() + loss


def batch(step, rank, n=40): return torch.randn(n, 6, generator=torch.Generator().manual_seed(100 * step + rank))


def joint(step): return torch.cat([batch(step, rank) for rank in range(WORLD)])


def train(net, batches, forwards=1):
    opt = torch.optim.SGD(net.parameters(), 0.05)
    for x in batches:
        opt.zero_grad()
        sum(net(part) for part in x.chunk(forwards)).div(forwards).backward()
        opt.step()


def whole(state): return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in state.items()}


def in_ddp(rank, forwards=1, **options):
    net, chosen = Net(**options), []
    net.vq.register_forward_hook(lambda vq, args, out: chosen.append(out.indices))
    train(DDP(net), [batch(k, rank) for k in range(4)], forwards)
    return whole(net.state_dict()), chosen[-1]


def uneven(rank):
    "Three steps here, five there; the codebooks learn by themselves, so that no one waits for a process that has finished."
    net = DDP(Net(sync=False), broadcast_buffers=False)
    with Join([net]): train(net, [batch(k, rank) for k in range(3 + 2 * rank)])
    return {k: v.detach().clone() for k, v in net.module.named_parameters()} | {"batches": net.module.vq.batches.clone()}


def in_fsdp(rank, **options):
    net = Net(**options)
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    train(net, [batch(k, rank) for k in range(4)])
    vq, z = net.vq, batch(9, 0)
    seen = {"divided": isinstance(vq.codebook, DTensor), "state": whole(net.state_dict()), "indices": vq.encode(z), "usage": vq.diagnose(z).usage,
            "decoded": vq.decode(vq.encode(z)).detach()}
    vq.kmeans_init(joint(9), generator=torch.Generator().manual_seed(0))
    return seen | {"placed": whole({"codebook": vq.codebook})["codebook"]}


def in_fsdp_with_revival(rank):
    "How many codes are on vectors of a batch far away, after all have been revived there in a training step without an optimizer."
    net = Net(learnable=True, revive_after=1)
    fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    net.vq.waited.fill_(5)
    net(batch(0, rank) + 100).backward()
    return (whole({"codebook": net.vq.codebook})["codebook"].abs().amax(1) > 10).sum()


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    found = {"ddp": in_ddp(rank), "ddp learnable": in_ddp(rank, learnable=True), "ddp revival": in_ddp(rank, revive_after=1), "two forwards": in_ddp(rank, forwards=2),
             "apart": in_ddp(rank, sync=False), "uneven": uneven(rank)}
    if DIVIDES: found |= {"fsdp": in_fsdp(rank), "fsdp learnable": in_fsdp(rank, learnable=True), "fsdp revival": in_fsdp_with_revival(rank)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    mp.start_processes(process, (str(folder),), nprocs=WORLD, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def alone(forwards=1, **options):
    net = Net(**options)
    if forwards == 1: train(net, [joint(k) for k in range(4)])
    else: train(net, [torch.cat([batch(k, r).chunk(2)[part] for part in range(2) for r in range(WORLD)]) for k in range(4)], forwards)
    return net


@pytest.mark.parametrize("name, options", [("ddp", {}), ("ddp learnable", {"learnable": True}), ("ddp revival", {"revive_after": 1}), ("two forwards", {"forwards": 2})])
def test_ddp_learns_what_one_process_would(found, name, options):
    "DDP broadcasts the buffers of the first process before each forward: they are equal already."
    expected = alone(**options).state_dict()
    for state in found: assert_close(state[name][0], whole(expected), rtol=1e-4, atol=1e-5)


def test_without_sync_ddp_broadcasts_the_codebook_of_the_first_process(found):
    "`sync=False` wants `broadcast_buffers=False` beside it: else what the others learn is overwritten before every step."
    (first, _), (second, _) = (state["apart"] for state in found)
    assert not torch.equal(first["vq.codebook"], second["vq.codebook"])   # each has learned alone in the last step,
    counts = [(state["vq.counts"] - 0.2 * chosen.bincount(minlength=24)) / 0.8 for state, chosen in (state["apart"] for state in found)]
    assert_close(*counts)                                                 # but began it with the counts of the first process


def test_uneven_steps_under_join(found):
    for name in found[0]["uneven"].keys() - {"batches"}: assert_close(found[0]["uneven"][name], found[1]["uneven"][name])
    assert [state["uneven"]["batches"].item() for state in found] == [3, 5]


@needs_fsdp2
@pytest.mark.parametrize("name, options", [("fsdp", {}), ("fsdp learnable", {"learnable": True})])
def test_fsdp2_learns_what_one_process_would(found, name, options):
    net = alone(**options)
    z, expected = batch(9, 0), whole(net.state_dict())
    indices, usage = net.vq.encode(z), net.vq.diagnose(z).usage
    decoded = net.vq.decode(indices).detach()
    net.vq.kmeans_init([joint(9), joint(9)], generator=torch.Generator().manual_seed(0))
    for state in found:
        seen = state[name]
        assert seen["divided"] == bool(options)
        assert_close(seen["state"], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(seen["indices"], indices) and seen["usage"] == usage
        assert_close(seen["decoded"], decoded, rtol=1e-4, atol=1e-5)
        assert_close(seen["placed"], net.vq.codebook.detach(), rtol=1e-4, atol=1e-5)


@needs_fsdp2
def test_fsdp2_throws_away_what_is_written_in_the_forward_pass(found):
    "A limit that the page on compatibility states: 24 codes were revived far away, and none of them stayed there."
    net = Net(learnable=True, revive_after=1)
    net.vq.waited.fill_(5)
    net(joint(0) + 100)
    assert (net.vq.codebook.detach().abs().amax(1) > 10).sum() == 24      # without FSDP2 they do
    for state in found: assert state["fsdp revival"] == 0
