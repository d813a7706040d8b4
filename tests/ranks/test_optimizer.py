"""The wrapped optimizer: the averaged gradient is the gradient of the whole batch, held against plain MPI."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_world import digest

from hvdtrain.errors import ConfigError
from hvdtrain.settings.compression import EXACT

SAMPLES = 24  # divides by 1, 2, 3 and 4 ranks


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)


def data(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, 6, generator=generator).to(dtype), torch.randint(0, 3, (SAMPLES,), generator=generator)


def share(world, tensor):
    return tensor[world.rank :: world.size]


def largest_difference(model, reference):
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
def test_equals_one_process_on_the_whole_batch(world, name, clip):
    model, reference = network(), network()
    optimizer = world.wrap(OPTIMIZERS[name](model.parameters()), model)
    alone = OPTIMIZERS[name](reference.parameters())
    for step in range(10):
        x, y = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(share(world, x)), share(world, y)).backward()
        alone.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        if clip:
            optimizer.synchronize()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
            assert norm.item() == pytest.approx(expected.item(), abs=1e-12)
            assert expected > clip
        optimizer.step()
        alone.step()
    assert isinstance(optimizer, type(alone))
    assert largest_difference(model, reference) < 1e-12
    assert len(set(world.all_gather_object(digest(model.parameters()), "end"))) == 1


def test_the_averaged_gradient_is_mpis(world):
    """Plain MPI through mpi4py as the oracle (where MPI launched us; under Gloo, gathered objects)."""
    model = network()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    x, y = data(0)
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(share(world, x)), share(world, y)).backward()
    local = [p.grad.numpy() for p in plain.parameters()]
    optimizer.zero_grad()
    F.cross_entropy(model(share(world, x)), share(world, y)).backward()
    optimizer.synchronize()
    if world.launch.launcher == "mpirun":
        from mpi4py import MPI

        assert MPI.COMM_WORLD.size == world.size
        means = [MPI.COMM_WORLD.allreduce(gradient) / world.size for gradient in local]
    else:
        everyone = world.all_gather_object(local, "local")
        means = [sum(parts) / world.size for parts in zip(*everyone, strict=True)]
    for parameter, mean in zip(model.parameters(), means, strict=True):
        assert abs(parameter.grad.numpy() - mean).max() < 1e-15


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_accumulation_and_a_short_window(world, passes):
    """The window holds 3 backward passes; fewer on some ranks are summed and averaged all the same."""
    model, reference = network(), network()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, accum_steps=3)
    alone = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(4):
        mine = passes if world.rank == 0 else 3
        optimizer.zero_grad()
        alone.zero_grad()
        total = 3 * (world.size - 1) + passes
        for rank in range(world.size):
            for i in range(passes if rank == 0 else 3):
                x, y = data(100 * step + 10 * rank + i)
                (F.cross_entropy(reference(x), y) / total).backward()
        for i in range(mine):
            x, y = data(100 * step + 10 * world.rank + i)
            (F.cross_entropy(model(x), y) * world.size / total).backward()
        optimizer.synchronize()
        optimizer.step()
        alone.step()
    assert largest_difference(model, reference) < 1e-12


def test_a_rank_without_samples_counts_as_zero(world):
    model, reference = network(), network()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    alone = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        x, y = data(step)
        optimizer.zero_grad()
        if world.rank == world.size - 1:
            (F.cross_entropy(model(x), y) * world.size).backward()
        optimizer.step()
        alone.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        alone.step()
    assert largest_difference(model, reference) < 1e-12


def test_synchronize_twice_averages_once(world):
    model = network()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    x, y = data(0)
    F.cross_entropy(model(share(world, x)), share(world, y)).backward()
    optimizer.synchronize()
    once = [p.grad.clone() for p in model.parameters()]
    optimizer.synchronize()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), once, strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_formats_on_the_wire(world, name):
    """Horovod's own fp16 compression sums first: an average of 60000 becomes infinite."""
    model = network(torch.float32)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, compression=name, bucket_bytes=100)
    for step in range(3):
        optimizer.zero_grad()
        (sum((p * (step + 1)).sum() for p in model.parameters()) * 20000 * (world.rank + 1)).backward()
        mean = 20000 * (step + 1) * (world.size + 1) / 2
        for parameter in model.parameters():
            assert parameter.grad.dtype == torch.float32
            if mean < 65504 or name != "fp16":
                assert parameter.grad.flatten().tolist() == pytest.approx([mean] * parameter.numel(), rel=1e-2)
        optimizer.step()
    assert len(set(world.all_gather_object(digest(model.parameters()), "format"))) == 1


def test_bfloat16_parameters(world):
    model = network(torch.bfloat16)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    x, y = data(0, torch.bfloat16)
    F.cross_entropy(model(share(world, x)).float(), share(world, y)).backward()
    optimizer.step()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert len(set(world.all_gather_object(digest(model.parameters()), "bf16"))) == 1


def test_channels_last_gradients(world):
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(world.rank))
    images = images.contiguous(memory_format=torch.channels_last)
    plain(images).square().sum().backward()
    assert not plain.weight.grad.is_contiguous()
    mean = sum(world.all_gather_object(plain.weight.grad, "plain")) / world.size
    model(images).square().sum().backward()
    optimizer.synchronize()
    torch.testing.assert_close(model.weight.grad, mean)
    optimizer.step()
    assert len(set(world.all_gather_object(digest(model.parameters()), "conv"))) == 1


def test_backward_that_fails_with_gradients_on_the_wire(world):
    """On all ranks alike; alone, a rank that went on would leave the others waiting."""
    if world.size == 1:
        pytest.skip("nothing is on the wire")
    model = network()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, bucket_bytes=1)
    x, y = data(0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()

    def fail(gradient):
        raise ValueError("out of memory")

    handle = model[0].weight.register_hook(fail)
    with pytest.raises(ValueError, match="out of memory"):
        F.cross_entropy(model(x), y).backward()
    handle.remove()
    with pytest.raises(RuntimeError, match="the other ranks wait"):
        optimizer.zero_grad()
    optimizer.synchronize()
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


def test_schedulers_and_state_dicts_work(world):
    model = network()
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.1), model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(2):
        x, y = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    copy_of_state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copy_of_state)
    assert optimizer.state_dict()["state"][0]["step"].item() == 2


def test_two_runs_are_bitwise_the_same(world, monkeypatch):
    """Horovod's own fusion depends on timing: with more than two ranks, sums would differ in their last bits."""
    monkeypatch.setattr("hvdtrain.world.buckets.FIRST_BUCKET_BYTES", 100)
    ends = set()
    for _ in range(3):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(16, 16) for _ in range(12)]
        model = torch.nn.Sequential(*(module for layer in layers for module in (layer, torch.nn.Tanh())))
        optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model, bucket_bytes=3000)
        generator = torch.Generator().manual_seed(world.rank)
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(4, 16, generator=generator)).square().mean().backward()
            optimizer.step()
        ends.add(digest(model.parameters()))
        del optimizer
    assert len(ends) == 1


def test_mean_square_is_that_of_the_ranks_own_gradients(world):
    """For the gradient noise scale; the averaged gradient is the same with it and without."""
    model, plain = network(), network()
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, has_square=True, bucket_bytes=100)
    without = world.wrap(torch.optim.SGD(plain.parameters(), lr=0.1), plain)
    for step in range(4):
        x, y = (share(world, tensor) for tensor in data(step))
        own = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        expected = world.all_reduce(sum(gradient.square().sum() for gradient in own), "mean", f"square.{step}")
        for one, steps in ((model, optimizer), (plain, without)):  # one after the other: their names are the same
            steps.zero_grad()
            F.cross_entropy(one(x), y).backward()
            steps.step()
        assert without.mean_square is None
        if world.size == 1:
            assert optimizer.mean_square is None
        else:
            assert optimizer.mean_square.item() == pytest.approx(expected.item(), rel=1e-12)
    assert largest_difference(model, plain) == 0
    if world.size > 1:
        with pytest.raises(ConfigError, match="noise-scale needs averaged, dense gradients"):
            world.wrap(torch.optim.SGD(plain.parameters(), lr=0.1), plain, has_square=True, compression="fp16")
