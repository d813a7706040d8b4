"""What only connected ranks can measure: clocks, a shared directory, the all-reduce, each pair of hosts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hvdtrain.settings.paths import existing_parent
from hvdtrain.verbs.doctor.facts import RankFacts, interface_mbit, interface_towards
from hvdtrain.verbs.phase_clock import seconds_of
from hvdtrain.world import World
from hvdtrain.world.door import Door, knock
from hvdtrain.world.inspect import plain_mpi

SIZES = (8, 64 * 2**10, 2**20, 16 * 2**20)
_SECONDS_A_SIZE = 0.25
_LONGEST_CALL_S = 1.0
_PAIR_BYTES = 4 * 2**20
_PAIR_LIMIT_S = 10.0
_MOST_HOSTS_ALL_PAIRS = 16


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """One size of all-reduce over all ranks; seconds are of one call, the slowest rank's median."""

    num_bytes: int
    horovod_s: float
    mpi_s: float | None
    """Plain MPI's, where mpi4py sees the same ranks."""

    def bandwidth(self, seconds: float, size: int) -> float:
        """Return the bytes per second that each rank sends and receives in a ring: 2 (size - 1) / size x bytes."""
        return 2 * (size - 1) / size * self.num_bytes / seconds


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One TCP connection between two hosts. `bytes_per_s` 0: they could not be connected."""

    hosts: tuple[str, str]
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """What the ranks measured together. The same on every rank."""

    all_reduces: tuple[AllReduce, ...] = ()
    pairs: tuple[Pair, ...] = ()


def facts_of_the_group(world: World, own: RankFacts) -> RankFacts:
    """Return a rank's facts with those that need the others: clock, shared directory, interface. Collective."""
    clock = []
    for i in range(5):
        world.barrier(f"doctor.clock.{i}")
        clock.append(time.time())
    host, targets = world.broadcast_object((own.host, list(own.addresses.values())), "doctor.addresses")
    interface = None
    if own.host != host:
        interface = interface_towards([item for item in targets if not item.startswith("127.")], own.addresses)
    return dataclasses.replace(
        own,
        clock_s=tuple(clock),
        sees_rank_0_file=_sees_rank_0_file(world, Path(own.run_dir)),
        interface=interface,
        interface_mbit=interface_mbit(interface),
    )


def measure(world: World, everyone: Sequence[RankFacts]) -> Network:
    """Measure the network between the ranks; a few seconds. Collective."""
    if world.size == 1:
        return Network()
    return Network(all_reduces=tuple(_all_reduces(world)), pairs=tuple(_pairs(world, everyone)))


def _sees_rank_0_file(world: World, run_dir: Path) -> bool | None:
    """Return whether a file that rank 0 makes is seen by this rank; None where rank 0 cannot write. Collective."""
    path = None
    if world.rank == 0:
        with contextlib.suppress(OSError):
            path = existing_parent(run_dir) / f".hvdtrain-doctor-{secrets.token_hex(8)}"
            path.touch(exist_ok=False)
    made = world.broadcast_object(path if path is not None and path.exists() else None, "doctor.file")
    # A network file system may show a new file late; in one's own directory, not in rank 0's path, as training does.
    sees = None
    if made is not None:
        mine = existing_parent(run_dir) / made.name
        deadline = time.monotonic() + 2.0
        while not (sees := mine.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
    world.barrier("doctor.file.seen")
    if path is not None:
        path.unlink(missing_ok=True)
    return sees


def _all_reduces(world: World) -> Iterator[AllReduce]:
    mpi = plain_mpi(world)
    if not all(world.all_gather_object(mpi is not None, "doctor.mpi")):
        mpi = None
    previous: AllReduce | None = None
    for num_bytes in SIZES:
        if previous and previous.horovod_s * num_bytes / previous.num_bytes > _LONGEST_CALL_S and num_bytes > SIZES[1]:
            return
        tensor = torch.zeros(num_bytes // 4, device=world.device)

        def reduce(tensor: torch.Tensor = tensor) -> None:
            world.all_reduce(tensor, "sum", f"doctor.{tensor.numel()}")

        horovod_s = _time(world, reduce)
        mpi_s = _time(world, lambda size=num_bytes: mpi(size)) if mpi else None  # type: ignore[misc]
        previous = AllReduce(num_bytes=num_bytes, horovod_s=horovod_s, mpi_s=mpi_s)
        yield previous


def _time(world: World, call: Callable[[], None]) -> float:
    """Return the seconds of one call: the median of each rank's, of these the largest. Collective."""
    call()
    world.barrier("doctor.time")
    first = seconds_of(call, world.device)
    slowest = max(world.all_gather_object(first, "doctor.first"))
    times = [seconds_of(call, world.device) for _ in range(max(2, min(50, int(_SECONDS_A_SIZE / slowest))))]
    return max(world.all_gather_object(sorted(times)[len(times) // 2], "doctor.median"))


def _pairs(world: World, everyone: Sequence[RankFacts]) -> Iterator[Pair]:
    """Measure TCP between the hosts, two by two, so that no host is in two pairs at a time. Collective."""
    leaders: dict[str, RankFacts] = {}
    for facts in everyone:
        leaders.setdefault(facts.host, facts)
    hosts = list(leaders)
    if len(hosts) < 2:
        return
    mine = hosts.index(everyone[world.rank].host) if leaders[everyone[world.rank].host].rank == world.rank else -1
    token = world.broadcast_object(secrets.token_bytes(32), "doctor.token")
    door = Door(token, world.size) if mine >= 0 else None
    ports = world.all_gather_object(door.listen([""])[0][1] if door else 0, "doctor.ports")
    for number, turn in enumerate(schedule(len(hosts))):
        result = None
        for first, second in turn:
            if mine == first and door:
                _answer(door)
            elif mine == second:
                leader = leaders[hosts[first]]
                places = [(address, ports[leader.rank]) for address in leader.addresses.values()]
                result = _ask(places, token, world.rank, (hosts[first], hosts[second]))
        yield from (pair for pair in world.all_gather_object(result, f"doctor.turn.{number}") if pair)
    if door:
        door.close()


def schedule(num_hosts: int) -> list[list[tuple[int, int]]]:
    """Return turns of pairs, each host at most once a turn: all pairs of up to 16 hosts, else neighbours only."""
    if num_hosts > _MOST_HOSTS_ALL_PAIRS:
        return [[(i, i + 1) for i in range(start, num_hosts - 1, 2)] for start in (0, 1)]
    even = num_hosts + num_hosts % 2
    circle = list(range(even))
    turns = []
    for _ in range(even - 1):
        pairs = [(circle[i], circle[-1 - i]) for i in range(even // 2)]
        turns.append([(min(pair), max(pair)) for pair in pairs if max(pair) < num_hosts])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return turns


def _answer(door: Door) -> None:
    """Serve one measurement to the rank that comes; strangers are left at the door."""
    deadline = time.monotonic() + _PAIR_LIMIT_S
    while time.monotonic() < deadline:
        select.select([door], [], [], 0.1)
        for _, connection in door.arrivals():
            with contextlib.suppress(OSError), connection:
                connection.settimeout(_PAIR_LIMIT_S)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while size := struct.unpack("!I", _receive(connection, 4))[0]:
                    _receive(connection, size)
                    connection.sendall(b"!")
            return


def _ask(places: Sequence[tuple[str, int]], token: bytes, rank: int, hosts: tuple[str, str]) -> Pair:
    for place in places:
        if place[0].startswith("127."):
            continue
        connection = knock(place, token, rank, timeout_s=2.0)
        if connection is None:
            continue
        with contextlib.suppress(OSError), connection:
            connection.settimeout(_PAIR_LIMIT_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            latency_s = min(_send(connection, 1) for _ in range(20)) / 2
            seconds = _send(connection, _PAIR_BYTES)  # a connection starts slowly: on a fast one again
            if seconds < _SECONDS_A_SIZE:
                seconds = min(seconds, _send(connection, _PAIR_BYTES))
            connection.sendall(struct.pack("!I", 0))
            return Pair(hosts=hosts, latency_s=latency_s, bytes_per_s=_PAIR_BYTES / seconds)
    return Pair(hosts=hosts, latency_s=_PAIR_LIMIT_S, bytes_per_s=0.0)


def _send(connection: socket.socket, size: int) -> float:
    """Send that many bytes and return the seconds until they are acknowledged."""
    payload = struct.pack("!I", size) + bytes(size)
    started = time.perf_counter()
    connection.sendall(payload)
    _receive(connection, 1)
    return time.perf_counter() - started


def _receive(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        part = connection.recv(min(size - len(received), 1 << 20))
        if not part:
            raise OSError(os.strerror(104))
        received += part
    return bytes(received)
