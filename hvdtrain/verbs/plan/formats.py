"""What collectives other than all-reduces, and whole formats of gradients, take: measured on all ranks. Collective."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvdtrain.settings import CommConfig
from hvdtrain.settings.compression import EXACT, parse_compression
from hvdtrain.trainer.device_clock import finish
from hvdtrain.verbs.phase_clock import seconds_of
from hvdtrain.verbs.plan.kinds import Kinds
from hvdtrain.verbs.plan.methods import Format, sends_of
from hvdtrain.verbs.plan.network import Layout, Network, Timing, paced
from hvdtrain.verbs.plan.step import Bucket, travelling
from hvdtrain.world import Cargo, Codec, EchoWorld, World, begin_exchange, codec_of

# Ranks that a format's own computing is measured for, as one rank does it: what it gathers grows with them.
_ECHOES = (2, 4, 8)
_REPEATS = 3
# No further repetition of what has taken so long.
_SECONDS = 5.0
_SMALL = 4 << 10
# Far outside of these the network was not what its single collectives tell.
LEAST_PACE, MOST_PACE = 0.4, 2.5


def with_paces(world: World, layout: Layout, network: Network, buckets: Sequence[Bucket]) -> Network:
    """Return the network with the pace of the collectives that formats use besides all-reduces. Collective."""
    largest = max(_SMALL * 4, max(bucket.num_bytes for bucket in buckets) // 4)
    for way, run in _collectives(world).items():
        timings = []
        for num_bytes in (_SMALL, largest):
            count = -(-num_bytes // (2 * world.size)) * world.size
            tensor = torch.zeros(count, dtype=torch.int16, device=world.device)
            seconds = _slowest(world, lambda: run(tensor), f"plan.{way}.{num_bytes}")  # noqa: B023  called here
            timings.append(Timing(layout, tensor.nbytes, seconds))
        network = paced(network, way, timings)
    return network


def _collectives(world: World) -> dict[Kinds, Callable[[torch.Tensor], Any]]:
    found: dict[Kinds, Callable[[torch.Tensor], Any]] = {
        "all_gather": lambda tensor: world.start_all_gather(tensor, "plan.all_gather")(),
        "all_to_all": lambda tensor: world.start_all_to_all(tensor, "plan.all_to_all")(),
    }
    if world.adds_bfloat16:
        found["shares"] = lambda tensor: world.start_all_reduce_(tensor.view(torch.bfloat16), "sum", "plan.shares")()
    return found


def measured_formats(
    world: World,
    layout: Layout,
    comm: CommConfig,
    names: Sequence[str],
    buckets: Sequence[Bucket],
    networks: tuple[Network, Network | None],
) -> dict[str, Format]:
    """Measure formats of gradients; the same on all ranks. Collective.

    Args:
        world: of all ranks, at least two.
        layout: of them.
        comm: for the smallest tensor that is compressed.
        names: as `--comm.compression` says them.
        buckets: of the gradients, with their shapes.
        networks: fitted, for fp32 and for fp16.
    """
    found = {}
    for name in names:
        cargoes = [bucket.cargo(name) for bucket in travelling(buckets, name)]
        computes = {}
        for size in _ECHOES:
            echo = EchoWorld(world.device, size, adds_bfloat16=world.adds_bfloat16)
            own = _exchange(echo, _codec(name, comm), cargoes, name)
            world.barrier(f"plan.echo.{name}.{size}")  # the ranks of a host compute at the same time, as in training
            computes[size] = _fastest(own)
        computes = {
            size: max(times)
            for size, *times in zip(
                computes,
                *[given.values() for given in world.all_gather_object(computes, f"plan.computes.{name}")],
                strict=True,
            )
        }
        seconds = _slowest(world, _exchange(world, _codec(name, comm), cargoes, name), f"plan.exchange.{name}")
        one = Format(name, computes, seconds)
        sends = sends_of(buckets, name, comm.compression_min_size, layout, networks, adds_bfloat16=world.adds_bfloat16)
        predicted = sum(send.seconds for send in sends)
        own_s = min(one.computes(world.size), seconds)
        pace = (seconds - own_s) / predicted if predicted else 1.0
        pace = min(MOST_PACE, max(LEAST_PACE, pace))
        found[name] = dataclasses.replace(one, pace=pace, explained_s=own_s + predicted)
    return found


def _codec(name: str, comm: CommConfig) -> Codec:
    options = {} if parse_compression(name)[0] in EXACT else {"min_size": comm.compression_min_size}
    return codec_of(name, **options)


def _exchange(world: World, codec: Codec, cargoes: Sequence[Cargo], name: str) -> Callable[[], None]:
    """Return what averages all gradients once, over and over the same ones."""
    buffers = [cargo.buffer(codec, world) for cargo in cargoes]

    def run() -> None:
        begin_exchange(world, codec, f"plan.{name}", cargoes, [buffer.clone() for buffer in buffers])()
        finish(world.device)

    return run


def _fastest(run: Callable[[], Any]) -> float:
    """Return the least seconds of a call, which others disturb the least; the first one warms up."""
    run()
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _SECONDS:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def _slowest(world: World, run: Callable[[], Any], name: str) -> float:
    """Return the median seconds of a collective, the slowest rank's. Collective."""
    run()  # the first one negotiates
    times: list[float] = []
    while True:
        world.barrier(f"{name}.begin")
        times.append(seconds_of(run, world.device))
        if len(times) == _REPEATS or world.all_reduce(sum(times), "max", f"{name}.total") > _SECONDS:
            return max(world.all_gather_object(statistics.median(times), f"{name}.median"))
