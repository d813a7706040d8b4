"""All-reduces over groups of ranks, measured: what the model of the network is fitted to. Collective."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from hvdtrain.verbs.phase_clock import seconds_of
from hvdtrain.verbs.plan.network import Layout, Timing
from hvdtrain.world import World
from hvdtrain.world.inspect import plain_mpi

# From latency alone to where a fast link's rate is reached: between GPUs that is beyond 64 MiB.
SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20)
_SECONDS_A_SIZE = 0.3


def sizes_for(buckets: Sequence[int]) -> list[int]:
    """Return the bytes that are measured where these many travel at a time: up to the largest, and that itself."""
    largest = max(buckets)
    return sorted({*(size for size in SIZES if size < largest), largest})


def groups_of(size: int, per_host: int) -> list[tuple[int, ...]]:
    """Return the groups of ranks, smaller than the world, whose all-reduces are measured.

    One rank alone, which shows what is no network's; 2, 4, ... ranks in turn; one rank of each of 2, 4, ... hosts.
    """
    if size == 1:
        return []
    groups = [(0,), *(tuple(range(n)) for n in _doubling(size))]
    if 1 < per_host < size:
        leaders = range(0, size, per_host)
        groups += [tuple(leaders[:n]) for n in (*_doubling(len(leaders)), len(leaders)) if n > 1]
    return [group for group in dict.fromkeys(groups) if len(group) < size]


def _doubling(size: int) -> list[int]:
    return [2**k for k in range(1, size.bit_length()) if 2**k < size]


def all_reduce_timings(
    world: World, hosts: Sequence[str], sizes: Sequence[int], dtype: torch.dtype
) -> tuple[list[Timing], dict[int, float]]:
    """Measure all-reduces of these sizes over groups of ranks. Collective.

    Args:
        world: whose groups were made by `groups_of`.
        hosts: of each rank.
        sizes: bytes.
        dtype: of the numbers.

    Returns:
        The timings, and plain MPI's seconds by size over all ranks, where mpi4py sees the same ones. The same on all.
    """
    timings: list[Timing] = []
    groups = [*groups_of(world.size, max(map(list(hosts).count, hosts))), tuple(range(world.size))]
    for group in groups:
        layout = Layout(len(group), len({hosts[rank] for rank in group}))
        for num_bytes in sizes if len(group) > 1 else sizes[:1]:
            seconds = _time_group(world, group, num_bytes, dtype)
            timings.append(Timing(layout, num_bytes, seconds, is_part=len(group) < world.size))
    plain: dict[int, float] = {}
    mpi = plain_mpi(world)
    if all(world.all_gather_object(mpi is not None, "plan.mpi")) and mpi is not None:
        for num_bytes in sizes:
            times = [seconds_of(lambda size=num_bytes: mpi(size), world.device) for _ in range(5)]  # type: ignore[misc]
            plain[num_bytes] = max(world.all_gather_object(statistics.median(times), f"plan.mpi.{num_bytes}"))
    return timings, plain


def _time_group(world: World, group: tuple[int, ...], num_bytes: int, dtype: torch.dtype) -> float:
    name = f"plan.{'-'.join(map(str, group))}.{num_bytes}.{dtype}"
    mine = 0.0
    tensor = torch.zeros(max(1, num_bytes // dtype.itemsize), dtype=dtype, device=world.device)
    is_in = world.rank in group
    if is_in:
        world.all_reduce_among(group, tensor, name)  # the first one negotiates
    world.barrier(f"{name}.begin")
    if is_in:
        first = seconds_of(lambda: world.all_reduce_among(group, tensor, name), world.device)
        slowest = float(world.all_reduce_among(group, torch.tensor([first]), f"{name}.first", "max"))
        repeats = max(3, min(100, int(_SECONDS_A_SIZE / max(slowest, 1e-6))))
        times = [seconds_of(lambda: world.all_reduce_among(group, tensor, name), world.device) for _ in range(repeats)]
        mine = statistics.median(times)
    return max(world.all_gather_object(mine, f"{name}.median"))
