"""One of several ranks: everything that `World` does, on tensors of the GPU, against plain arithmetic.

Prints a line of JSON: what was wrong on which rank, by the name of the check.
"""

import json
import traceback

import torch
from torch import nn

from hvdtrain.world import codec_of, init

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64)


def value_of(rank, dtype, device, size=1000):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 20, (size,), generator=generator).to(dtype).to(device)


def all_reduces(world):
    for dtype in TYPES:
        everyone = [value_of(rank, dtype, world.device) for rank in range(world.size)]
        stack = torch.stack([each.double() for each in everyone])
        expected = {"sum": stack.sum(0), "min": stack.amin(0), "max": stack.amax(0)}
        for op, right in expected.items():
            got = world.all_reduce(everyone[world.rank], op, f"{op}.{dtype}")
            assert got.device == world.device, (op, dtype, got.device)
            assert got.dtype == dtype, (op, dtype, got.dtype)
            assert torch.equal(got.double(), right), (op, dtype)
        if dtype.is_floating_point:
            got = world.all_reduce(everyone[world.rank], "mean", f"mean.{dtype}")
            assert torch.allclose(got.double(), stack.mean(0), rtol=1e-2), dtype


def gathers(world):
    for dtype in (*TYPES, torch.bool):
        mine = value_of(world.rank, dtype, world.device, 3 + world.rank)
        right = torch.cat([value_of(rank, dtype, world.device, 3 + rank) for rank in range(world.size)])
        assert torch.equal(world.all_gather(mine, f"gather.{dtype}"), right), dtype
    cut = torch.arange(2.0 * world.size, device=world.device) + 100 * world.rank
    right = torch.cat([cut.chunk(world.size)[world.rank] - 100 * (world.rank - rank) for rank in range(world.size)])
    assert torch.equal(world.all_to_all(cut, "to_all"), right)
    got = world.reduce_scatter(cut, "sum", "scatter")
    total = sum(torch.arange(2.0 * world.size, device=world.device) + 100 * rank for rank in range(world.size))
    assert torch.equal(got, total.chunk(world.size)[world.rank])


def broadcasts(world):
    for dtype in (*TYPES, torch.bool):
        got = world.broadcast(value_of(world.rank, dtype, world.device), f"broadcast.{dtype}", root=world.size - 1)
        assert torch.equal(got, value_of(world.size - 1, dtype, world.device)), dtype
    torch.manual_seed(world.rank)
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).to(world.device)
    world.broadcast_state(model)
    world.check_replicas(dict(model.named_parameters()), "replicas")


def trained(world, compression, optimizer_type, **options):
    """Train ranks together and one model on all their batches; return the largest relative difference."""
    torch.manual_seed(0)
    model, twin = (nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 8)).to(world.device) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    averaged = world.wrap(optimizer_type(model.parameters(), **options), model, compression=compression)
    own = optimizer_type(twin.parameters(), **options)
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        batches = torch.randn(world.size, 16, 64, generator=generator).to(world.device)
        averaged.zero_grad()
        model(batches[world.rank]).square().mean().backward()
        averaged.step()
        own.zero_grad()
        (sum(twin(batch).square().mean() for batch in batches) / world.size).backward()
        own.step()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)


def optimizers(world):
    for compression, limit in (("none", 1e-5), ("fp16", 1e-2), ("bf16", 3e-2)):
        assert trained(world, compression, torch.optim.SGD, lr=0.1, momentum=0.9) < limit, compression
    assert trained(world, "none", torch.optim.AdamW, lr=1e-3, fused=True) < 1e-4


def approximate_gradients(world):
    """Formats that remember what they have not sent: ranks stay equal, bit by bit, and learn."""
    for compression in ("int8", "powersgd:4", "topk:0.3"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 300), nn.GELU(), nn.Linear(300, 64)).to(world.device)
        codec = codec_of(compression, min_size=1000)
        optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), model, compression=codec)
        generator = torch.Generator().manual_seed(world.rank)
        losses = []
        for _ in range(60):
            x = torch.randn(32, 64, generator=generator).to(world.device)
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], (compression, losses[::10])
        world.check_replicas(dict(model.named_parameters()), f"approximate.{compression}")


def approximate_gradients_that_wait_for_nothing(world):
    """Of PowerSGD: torch may wait for what its bases are made orthogonal by."""
    model = nn.Linear(300, 300, bias=False).to(world.device)
    codec = codec_of("powersgd:4", min_size=1000)
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), model, compression=codec)
    x = torch.randn(32, 300, device=world.device)
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def groups_of_ranks(world):
    """A group has a communicator of NCCL's own, made by its first collective."""
    got = world.all_reduce_among((world.rank,), torch.full((1000,), 3.0, device=world.device), f"own.{world.rank}")
    assert bool((got == 3).all())


def sparse_gradients(world):
    torch.manual_seed(0)
    table = nn.Embedding(50, 4, sparse=True).to(world.device)
    before = table.weight.detach().clone()
    optimizer = world.wrap(torch.optim.SGD(table.parameters(), lr=1.0), table)
    rows = [torch.tensor([rank, 7, 7], device=world.device) for rank in range(world.size)]
    table(rows[world.rank]).sum().backward()
    optimizer.step()
    expected = before.clone()
    for own in rows:
        expected.index_add_(0, own, torch.full((3, 4), -1.0 / world.size, device=world.device))
    assert torch.allclose(table.weight, expected, atol=1e-6)


def many_in_flight(world):
    """A hundred reductions are started before any is waited for, while the GPU computes what they send."""
    waits = []
    for i in range(100):
        tensor = torch.full((10_000 + 977 * i,), float(world.rank + 1), device=world.device)
        for _ in range(3):
            tensor = tensor * 2
        waits.append((i, world.start_all_reduce(tensor, "sum", f"many.{i}")))
    for i, wait in waits:
        got = wait()
        assert bool((got == 8 * world.size * (world.size + 1) / 2).all()), i


def own_streams(world):
    """What a stream of the user's own has computed is what is sent, and the stream that asks sees the result."""
    stream = torch.cuda.Stream()
    for i in range(20):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            tensor = torch.full((100_000,), float(i), device=world.device)
            got = world.all_reduce(tensor, "sum", f"stream.{i}") * 2
            assert bool((got == 2.0 * i * world.size).all()), i


def gathers_on_own_streams(world):
    """A gather's memory that is given back is not taken by the default stream while another one still reads it."""
    stream, size = torch.cuda.Stream(), 100_000
    for i in range(20):
        with torch.cuda.stream(stream):
            got = world.all_gather(torch.full((size,), float(i), device=world.device), f"gather.stream.{i}")
            torch.cuda._sleep(2_000_000)
            total = got.double().sum()
            del got
        taken = [torch.full((size * world.size,), -1.0, device=world.device) for _ in range(4)]
        stream.synchronize()  # the number is computed there, and would be read by the default stream
        assert float(total) == i * size * world.size, i
        del taken


def objects(world):
    """What lay on another rank's GPU lies on this one's."""
    found = world.all_gather_object({"own": torch.full((3,), float(world.rank), device=world.device)}, "objects")
    assert [each["own"].device for each in found] == [world.device] * world.size
    assert [each["own"].tolist() for each in found] == [[float(rank)] * 3 for rank in range(world.size)]


def who_has_joined(world):
    """Zeros stand for it, which are zeros still where many reductions of one size follow each other."""
    sums = []
    if world.rank == 0:
        tensors = [torch.full((1 << 20,), float(n + 1), device=world.device) for n in range(20)]
        waits = [world.start_all_reduce_(tensor, "sum", f"joined.{n}") for n, tensor in enumerate(tensors)]
        found = [wait() for wait in waits]
        sums = [(total.amin().item(), total.amax().item()) for total in found]
    world.answer_with_zeros(world.device.index)
    assert sums == [(n + 1.0, n + 1.0) for n in range(len(sums))], sums


class Joined(nn.Module):
    """Layers whose weights are put together for one product: each gradient is a part of the product's."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        both = nn.functional.linear(x, torch.cat([layer.weight for layer in self.layers]))
        return both.unflatten(-1, (len(self.layers), -1)).sum(-2)


def wide(world, accum_steps, as_views, joins):
    """Train a network whose gradients fill many buckets; return its weights and memory in bytes a parameter.

    Of the memory the most that was taken; with joined weights, whose copies are there until backward has used them and
    take as much as gradients do, what is taken behind backward.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(2048, 2048, bias=False) for _ in range(16)]
    groups = [Joined(*layers[i : i + 2]) for i in range(0, 16, 2)] if joins else layers
    model = nn.Sequential(*groups).to(world.device)
    optimizer = world.wrap(
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        model,
        accum_steps=accum_steps,
        gradient_as_bucket_view=as_views,
        follows_backward=as_views,
    )
    generator = torch.Generator().manual_seed(world.rank)
    for step in range(4):
        if step == 2:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        for _ in range(accum_steps):
            x = torch.randn(8, 2048, generator=generator).to(world.device)
            (model(x).square().mean() / accum_steps).backward()
        behind_backward = torch.cuda.memory_allocated()
        optimizer.step()
    torch.cuda.synchronize()
    taken = behind_backward if joins else torch.cuda.max_memory_allocated()
    count = sum(parameter.numel() for parameter in model.parameters())
    return [parameter.detach() for parameter in model.parameters()], taken / count


def gradient_views(world):
    """Gradients in the buckets: the same weights, in about 16 bytes a parameter instead of 20."""
    for accum_steps, joins in ((1, False), (1, True), (2, False)):
        plain, in_20 = wide(world, accum_steps, False, joins)
        plain = [parameter.cpu() for parameter in plain]
        views, in_16 = wide(world, accum_steps, True, joins)
        same = [torch.equal(a, b.cpu()) for a, b in zip(plain, views, strict=True)]
        del views
        assert all(same), same  # of two ranks' sums no order of the buckets changes a bit
        assert in_16 < in_20 - 2.5, (accum_steps, joins, in_16, in_20)


CHECKS = (
    *(all_reduces, gathers, broadcasts, optimizers, gradient_views, sparse_gradients),
    *(many_in_flight, own_streams, gathers_on_own_streams, groups_of_ranks),
    *(approximate_gradients, approximate_gradients_that_wait_for_nothing),
    *(objects, who_has_joined),
)


def main():
    world = init(lambda launch: [(rank,) for rank in range(launch.size)] if launch.size > 1 else [])
    wrong = {}
    for check in CHECKS:
        try:
            check(world)
            torch.cuda.synchronize()
        except Exception as error:  # every check is to be heard of
            wrong[check.__name__] = "".join(traceback.format_exception(error))[-1500:]
    everyone = world.all_gather_object(wrong, "wrong")
    if world.rank == 0:
        of_ranks = {f"{name} on rank {rank}": text for rank, each in enumerate(everyone) for name, text in each.items()}
        print(json.dumps({"device": world.device.type, "ranks": world.size, "wrong": of_ranks}), flush=True)
    world.close()


if __name__ == "__main__":
    main()
