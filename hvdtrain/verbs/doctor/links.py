"""Checks of what lies between the ranks: clocks, variables, interfaces, the all-reduce, pairs of hosts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from hvdtrain.verbs.doctor.facts import RankFacts
from hvdtrain.verbs.doctor.findings import Finding, error, ok, warning
from hvdtrain.verbs.doctor.machine import by_host, is_busy
from hvdtrain.verbs.doctor.network import AllReduce, Network, Pair
from hvdtrain.verbs.kit import ranks_text

_CLOCK_WARNING_S = 1.0
_SLOW_BYTES_PER_S = 0.1e9
_SLOWER_THAN_MPI = 8.0
_SLOW_PAIR_RATIO = 3.0
_SLOW_PAIR_S = 0.5e-3


def check_clocks(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Hosts whose clocks differ sort their logs and files wrongly."""
    first = ranks[0]
    offsets = {
        host: statistics.median(a - b for a, b in zip(own[0].clock_s, first.clock_s, strict=True))
        for host, own in by_host(ranks).items()
        if own[0].clock_s and first.clock_s
    }
    if len(offsets) < 2:
        return
    host = max(offsets, key=lambda name: abs(offsets[name]))
    figure = f"{host} is {abs(offsets[host]):.3f} s {'ahead of' if offsets[host] > 0 else 'behind'} {first.host}"
    if abs(offsets[host]) > _CLOCK_WARNING_S:
        yield warning("clocks", figure, f"on {host}: sudo timedatectl set-ntp true")
    else:
        yield ok("clocks", f"{figure}, the most of {len(offsets)} hosts")


def check_variables(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Environment variables that matter must be alike, or the ranks behave differently."""
    names = sorted({name for facts in ranks for name in facts.variables})
    different = 0
    for name in names:
        mine = ranks[0].variables.get(name)
        others = [facts for facts in ranks if facts.variables.get(name) != mine]
        if others:
            different += 1
            theirs = others[0].variables.get(name)
            yield warning(
                "variables",
                f"{name} is {theirs or 'not set'} on {ranks_text([facts.rank for facts in others])},"
                f" {mine or 'not set'} on rank 0",
                _alike(name, mine, ranks[0].launcher),
            )
    if not different and len(ranks) > 1:
        yield ok("variables", f"{len(names)} that matter are alike on all ranks")


def _alike(name: str, value: str | None, launcher: str) -> str:
    if value is None:
        return f"unset {name} on the other hosts (shell start-up files), or set it for all"
    forward = f"mpirun -x {name}={value}" if launcher == "mpirun" else f"export {name}={value} before the launcher"
    return f"{forward}; look into the hosts' shell start-up files"


def check_interfaces(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Which network interface leads to rank 0, and addresses that two hosts both have."""
    hosts = by_host(ranks)
    if len(ranks) > 1 and len(hosts) == 1:
        yield ok("interface", "none: all ranks are on one host")
    if len(hosts) < 2:
        return
    shared = _shared_addresses({host: own[0] for host, own in hosts.items()})
    if shared:
        yield warning(
            "interface",
            f"the address {shared[0]} of {shared[1]} is on several hosts: a launcher that tries it hangs",
            f"mpirun --mca btl_tcp_if_exclude lo,{shared[1]} --mca oob_tcp_if_exclude lo,{shared[1]};"
            " horovodrun --network-interfaces eth0",
        )
    others = [own[0] for host, own in hosts.items() if host != ranks[0].host]
    used = sorted({facts.interface or "unknown" for facts in others})
    speeds = sorted({facts.interface_mbit for facts in others if facts.interface_mbit})
    speed = f", {speeds[0] / 1000:g} Gbit/s" if speeds else ""
    yield ok("interface", f"{', '.join(used)} leads to {ranks[0].host}{speed}")


def _shared_addresses(hosts: dict[str, RankFacts]) -> tuple[str, str] | None:
    seen: set[str] = set()
    for facts in hosts.values():
        for name, address in facts.addresses.items():
            if address.startswith("127."):
                continue
            if address in seen:
                return address, name
            seen.add(address)
    return None


def check_all_reduce(ranks: Sequence[RankFacts], network: Network) -> Iterator[Finding]:
    """Latency and bandwidth by size, Horovod's next to plain MPI's."""
    size, hosts = len(ranks), len(by_host(ranks))
    for measured in network.all_reduces:
        yield ok("all-reduce", _figure(measured, size))
    if not network.all_reduces:
        return
    largest = network.all_reduces[-1]
    bandwidth = largest.bandwidth(largest.horovod_s, size)
    if hosts > 1 and bandwidth < _SLOW_BYTES_PER_S:
        yield warning(
            "bandwidth",
            f"{bandwidth / 1e9:.3f} GB/s between {hosts} hosts: no more than 1 Gbit/s Ethernet",
            "--comm.compression fp16, more --train.accum-steps; mpirun --mca btl_tcp_flags 1 where it is Ethernet",
        )
    is_quiet = not any(is_busy(own) for own in by_host(ranks).values())
    if is_quiet and largest.mpi_s and largest.horovod_s > _SLOWER_THAN_MPI * largest.mpi_s:
        yield warning(
            "bandwidth",
            f"Horovod takes {largest.horovod_s / largest.mpi_s:.1f} times as long as plain MPI for {_bytes(largest)}",
            "unset HOROVOD_CYCLE_TIME, and leave a core per rank: OMP_NUM_THREADS one lower",
        )


def _figure(measured: AllReduce, size: int) -> str:
    parts = [f"{_bytes(measured):>7}: Horovod {_performance(measured, measured.horovod_s, size)}"]
    if measured.mpi_s:
        parts.append(f"plain MPI {_performance(measured, measured.mpi_s, size)}")
    return ", ".join(parts)


def _performance(measured: AllReduce, seconds: float, size: int) -> str:
    text = f"{seconds * 1e3:.3g} ms"
    return text if measured.num_bytes < 1024 else f"{text} ({measured.bandwidth(seconds, size) / 1e9:.2g} GB/s)"


def _bytes(measured: AllReduce) -> str:
    n = measured.num_bytes
    return f"{n} B" if n < 2**10 else f"{n // 2**10} KiB" if n < 2**20 else f"{n // 2**20} MiB"


def check_pairs(network: Network) -> Iterator[Finding]:
    """TCP between each two hosts: which pair is slow, which host is in all the slow ones."""
    broken = [pair for pair in network.pairs if not pair.bytes_per_s]
    pairs = [pair for pair in network.pairs if pair.bytes_per_s]
    for pair in broken:
        yield error(
            "pairs of hosts",
            f"{pair.hosts[1]} cannot connect to {pair.hosts[0]} over TCP",
            f"open the firewall between them for all ports; from {pair.hosts[1]}: ping {pair.hosts[0]}",
        )
    if not pairs:
        return
    # Against the best, not the median: one slow host of three is in two of the three pairs.
    rate = max(pair.bytes_per_s for pair in pairs)
    latency = min(pair.latency_s for pair in pairs)
    slow = sorted((pair for pair in pairs if _is_slow(pair, rate, latency)), key=lambda pair: pair.bytes_per_s)
    for pair in slow[:5]:
        yield warning(
            "pairs of hosts",
            f"{' - '.join(pair.hosts)}: {_link(pair.latency_s, pair.bytes_per_s)}; the best pair has"
            f" {_link(latency, rate)}",
            _slow_remedy(pair, slow),
        )
    if not slow:
        name = " - ".join(pairs[0].hosts) if len(pairs) == 1 else f"the slowest of {len(pairs)}"
        slowest = max(pair.latency_s for pair in pairs), min(pair.bytes_per_s for pair in pairs)
        yield ok("pairs of hosts", f"{name}: {_link(*slowest)} over TCP")


def _is_slow(pair: Pair, rate: float, latency: float) -> bool:
    return pair.bytes_per_s * _SLOW_PAIR_RATIO < rate or pair.latency_s > _SLOW_PAIR_RATIO * latency + _SLOW_PAIR_S


def _slow_remedy(pair: Pair, slow: Sequence[Pair]) -> str:
    counts = {host: sum(host in item.hosts for item in slow) for host in pair.hosts}
    host = max(counts, key=lambda name: counts[name])
    suspect = f"{host} is in {counts[host]} slow pairs: " if counts[host] > 1 else ""
    return f"{suspect}ethtool on {host if suspect else ' and '.join(pair.hosts)} (speed, duplex), its cable and switch"


def _link(latency_s: float, bytes_per_s: float) -> str:
    return f"{latency_s * 1e3:.3g} ms, {bytes_per_s / 1e9:.3g} GB/s"
