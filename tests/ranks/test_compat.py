"""Scripts in the manner of Horovod's own, by bare Horovod and by its names here: equal losses, traps closed."""

import importlib

import pytest
import torch

from hvdtrain.compat import horovod as compat


@pytest.fixture(scope="module")
def hvd(world):
    compat.init()
    return compat


@pytest.fixture(scope="module")
def bare(world):
    return importlib.import_module("horovod.torch")


def train(hvd, tag, *, op=None, clips=False, passes=1, compression=None):
    """Train as Horovod's MNIST example does; returns the losses, averaged over the ranks, and the weights."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).double()
    data = torch.randn(24, 8, dtype=torch.float64)
    labels = data[:, :3].argmax(1)
    sampler = torch.utils.data.distributed.DistributedSampler(
        range(24), num_replicas=hvd.size(), rank=hvd.rank(), shuffle=False
    )
    mine = torch.tensor(list(sampler))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * hvd.size(), momentum=0.5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression or hvd.Compression.none,
        op=hvd.Average if op is None else op,
        backward_passes_per_step=passes,
    )
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        for part in mine.chunk(passes):
            loss = torch.nn.functional.cross_entropy(model(data[part]), labels[part]) / passes
            loss.backward()
        if clips:
            optimizer.synchronize()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        losses.append(hvd.allreduce(loss.detach(), name=f"{tag}.loss.{step}").item())
    return losses, torch.cat([parameter.detach().view(-1) for parameter in model.parameters()])


CASES = {
    "as in the MNIST example": {},
    "op=Sum": {"op": 1},
    "clipping": {"clips": True},
    "accumulation": {"passes": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_bare_horovods(hvd, bare, case):
    ours, weights = train(hvd, f"ours.{case}", **CASES[case])
    theirs, expected = train(bare, f"bare.{case}", **CASES[case])
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert torch.allclose(weights, expected, rtol=0, atol=1e-12)


def test_fp16_on_the_wire(hvd, bare):
    ours, _ = train(hvd, "ours.fp16", compression=hvd.Compression.fp16)
    theirs, _ = train(bare, "bare.fp16", compression=bare.Compression.fp16)
    assert ours == pytest.approx(theirs, rel=1e-2)


def exchanges(hvd):
    """Return the result of each collective, for a tensor that is each rank's own."""
    mine = torch.arange(6 * hvd.size(), dtype=torch.float64).view(-1, 2) + 100 * hvd.rank()
    splits = torch.tensor([1 if other else len(mine) - hvd.size() + 1 for other in range(hvd.size())]).int()
    moved, received = hvd.alltoall(mine, splits=splits, name="splits")
    return {
        "mean": hvd.allreduce(mine, name="mean"),
        "sum": hvd.allreduce(mine, name="sum", op=hvd.Sum),
        "min": hvd.allreduce(mine, name="min", op=hvd.Min),
        "max": hvd.allreduce(mine, name="max", op=hvd.Max),
        "product": hvd.allreduce(mine / 100, name="product", op=hvd.Product),
        "scaled": hvd.allreduce(mine, name="scaled", op=hvd.Sum, prescale_factor=0.5, postscale_factor=3.0),
        "in place": hvd.allreduce_(mine.clone(), name="in.place"),
        "gathered": hvd.allgather(mine[: hvd.rank() + 1], name="gathered"),
        "broadcast": hvd.broadcast(mine, hvd.size() - 1, name="broadcast"),
        "moved": hvd.alltoall(mine, name="moved"),
        "moved by splits": moved,
        "received": received.long(),
        "scattered": hvd.reducescatter(mine, name="scattered", op=hvd.Sum),
        "scattered unevenly": hvd.reducescatter(mine[:-1], name="uneven", op=hvd.Sum),
    }


def test_collectives_equal_bare_horovods(hvd, bare):
    ours, theirs = exchanges(hvd), exchanges(bare)
    for name, result in ours.items():
        assert torch.allclose(result, theirs[name], rtol=1e-12, atol=0), name


def test_gradients_go_through(hvd, bare):
    def gradients(library, tag):
        found = {}
        for name, call in {
            "allreduce": lambda x: library.allreduce(x, name=f"{tag}.reduce"),
            "sum": lambda x: library.allreduce(x, name=f"{tag}.sum", op=library.Sum),
            "allgather": lambda x: library.allgather(x, name=f"{tag}.gather"),
            "broadcast": lambda x: library.broadcast(x, 0, name=f"{tag}.broadcast"),
            "alltoall": lambda x: library.alltoall(x.repeat(library.size(), 1), name=f"{tag}.alltoall"),
            "reducescatter": lambda x: library.reducescatter(
                x.repeat(library.size(), 1), name=f"{tag}.scatter", op=library.Sum
            ),
        }.items():
            x = torch.arange(4.0, dtype=torch.float64).view(2, 2).requires_grad_()
            result = call(x)
            (result * (torch.arange(result.numel()).view_as(result) + library.rank())).sum().backward()
            found[name] = x.grad
        return found

    theirs = gradients(bare, "bare")
    for name, gradient in gradients(hvd, "ours").items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-12, atol=0), name


def test_a_rank_that_ends_earlier_joins(hvd, world):
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(layer.parameters(), lr=1.0), layer.named_parameters())
    for _ in range(2 + (world.rank == 0)):
        optimizer.zero_grad()
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    last = hvd.join()
    assert last == 0 or world.size == 1
    if world.rank == 0:
        assert layer.weight[0, 0].item() == pytest.approx(1.0 - 2.0 - 1.0 / world.size)
    world.broadcast_state(layer)


def test_batch_normalisation_over_all_ranks(hvd, world):
    torch.manual_seed(3)
    x = torch.randn(4 * world.size, 3, dtype=torch.float64)
    layer = hvd.SyncBatchNorm(3).double()
    whole = torch.nn.BatchNorm1d(3).double()
    mine = x[4 * world.rank : 4 * world.rank + 4]
    assert torch.allclose(layer(mine), whole(x)[4 * world.rank : 4 * world.rank + 4], atol=1e-12)
    assert torch.allclose(layer.running_var, whole.running_var, atol=1e-12)
