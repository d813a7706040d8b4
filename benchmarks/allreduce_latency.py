"""How long a blocking all-reduce takes, by size: this Horovod, a stock one, torch.distributed's Gloo and plain MPI.

    python benchmarks/allreduce_latency.py --stock FOLDER --output benchmarks/results/allreduce_latency.txt

FOLDER is where an unedited Horovod 0.28.1 was installed by `pip install --target`; without it that column is left out.
Every measurement is a launch of its own, and they take turns. Horovod is given memory as hvdtrain's buckets have it,
and plain MPI numpy's: both in huge pages where they are large. MPI yields while it waits where ranks fill all cores,
as in training. The median over launches of each one's median, then the worst launch's, then the 95th percentile of all.
A second table counts the launches whose own 95th percentile is within twice their median, which is the goal for all of
20 launches:

    python benchmarks/allreduce_latency.py --repeats 20 --output benchmarks/results/allreduce_latency_20.txt

That is 2 and 4 ranks and takes about half an hour, in which the machine must be quiet (four ranks need four cores: on
fewer they share them, and the file says so). The load before and after each half is written down.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

SIZES = (4, 1 << 10, 4 << 10, 64 << 10, 437 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
RUNNERS = ("horovod", "stock", "horovod-gloo", "stock-gloo", "torch-gloo", "mpi")
PORT = 29_511
STEADY = 2.0  # how many medians a launch's 95th percentile may be


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=5, help="launches of each")
    parser.add_argument("--seconds", type=float, default=0.3, help="for a size")
    parser.add_argument("--stock", type=Path, help="folder of an unedited Horovod")
    parser.add_argument("--runners", nargs="+", choices=RUNNERS, default=list(RUNNERS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", choices=RUNNERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.seconds)
        return
    runners = [name for name in given.runners if given.stock or not name.startswith("stock")]
    parts = [machine.describe(), f"load:     {os.getloadavg()[0]:.1f} in the minute before", ""]
    for ranks in given.ranks:
        times: dict[str, list[dict[int, list[float]]]] = {name: [] for name in runners}
        for _ in range(given.repeats):
            for name in runners:
                times[name].append(launch(name, ranks, given.seconds, given.stock))
                print(f"{ranks} ranks, {name}: {1e3 * statistics.median(times[name][-1][4]):.3f} ms", file=sys.stderr)
        cores = len(os.sched_getaffinity(0))
        sharing = f", which share {cores} cores" if ranks > cores else ""
        parts += [f"{ranks} ranks{sharing}, {given.repeats} launches of each: milliseconds", table(times), ""]
        parts += [f"launches of {given.repeats} whose 95th percentile is within {STEADY:g} times their median"]
        parts += [steady_table(times), "", f"load:     {os.getloadavg()[0]:.1f} in the minute before this line", ""]
    print("\n".join(parts))
    if given.output:
        given.output.write_text("\n".join(parts))


def table(times: dict[str, list[dict[int, list[float]]]]) -> str:
    """Return a row for each size: each runner's median, worst launch and 95th percentile, milliseconds."""
    rows = ["".join([f"{'bytes':>10}", *(f"{name:>27}" for name in times)])]
    for size in SIZES:
        row = f"{size:>10}"
        for launches in times.values():
            medians = [1e3 * statistics.median(one[size]) for one in launches]
            late = percentile_95([1e3 * value for one in launches for value in one[size]])
            row += f"{f'{statistics.median(medians):.3f} {max(medians):.3f} {late:.3f}':>27}"
        rows.append(row)
    return "\n".join(rows)


def steady_table(times: dict[str, list[dict[int, list[float]]]]) -> str:
    """Return a row for each size: how many launches of each runner are steady."""
    rows = ["".join([f"{'bytes':>10}", *(f"{name:>14}" for name in times)])]
    for size in SIZES:
        counts = [sum(is_steady(one[size]) for one in launches) for launches in times.values()]
        rows.append("".join([f"{size:>10}", *(f"{count:>14}" for count in counts)]))
    return "\n".join(rows)


def is_steady(seconds: list[float]) -> bool:
    """Return whether the 95th percentile of a launch's calls is within `STEADY` times their median."""
    return percentile_95(seconds) <= STEADY * statistics.median(seconds)


def percentile_95(values: list[float]) -> float:
    """Return the 95th percentile, one of the values."""
    return sorted(values)[int(0.95 * (len(values) - 1))]


def launch(runner: str, ranks: int, seconds: float, stock: Path | None) -> dict[int, list[float]]:
    """Start so many ranks that measure, and return the seconds of each all-reduce, by size in bytes."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HOROVOD_FUSION_THRESHOLD": "0"}
    if ranks >= len(os.sched_getaffinity(0)):
        environ["OMPI_MCA_mpi_yield_when_idle"] = "1"
    if runner.startswith("stock"):
        environ["PYTHONPATH"] = f"{stock}{os.pathsep}{environ.get('PYTHONPATH', '')}"
    start = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    if runner in ("horovod-gloo", "stock-gloo"):
        start = ["horovodrun", "--gloo", "-np", str(ranks)]
    command = [*start, sys.executable, __file__, "--measure", runner, "--seconds", str(seconds)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    (line,) = [line for line in done.stdout.splitlines() if "{" in line] or [f"{done.stdout}{done.stderr}"]
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stderr[-3000:]}")
    return {int(size): values for size, values in json.loads(line[line.index("{") :]).items()}


def measure(runner: str, seconds: float) -> None:
    """Time all-reduces in this rank; the first one prints what it has seen. Collective."""
    rank, reduce = {"torch-gloo": by_torch, "mpi": by_mpi}.get(runner, by_horovod)()
    taken: dict[int, list[float]] = {}
    for size in SIZES:
        call = reduce(size)
        # As often on every rank: by the size alone, as if it went at 2 GB/s.
        count = max(5, min(400, int(seconds / (5e-5 + size / 2e9))))
        for _ in range(max(3, count // 4)):
            call(-1)  # the first ones of a process find out how long others take
        taken[size] = []
        for i in range(count):
            started = time.perf_counter()
            call(i)
            taken[size].append(time.perf_counter() - started)
    if rank == 0:
        print(json.dumps(taken), flush=True)
    if runner == "torch-gloo":
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def by_horovod() -> tuple[int, Callable[[int], Callable[[int], None]]]:
    """Return the rank, and what makes an all-reduce of some size by Horovod."""
    import horovod.torch as hvd
    import torch

    from hvdtrain.world import huge_pages

    hvd.init()

    def of(size: int) -> Callable[[int], None]:
        tensor = huge_pages.zeros(size // 4, torch.float32, torch.device("cpu"))

        def call(_: int) -> None:
            hvd.synchronize(hvd.allreduce_async_(tensor, name=f"size{size}", op=hvd.Sum))

        return call

    return hvd.rank(), of


def by_torch() -> tuple[int, Callable[[int], Callable[[int], None]]]:
    """Return the same by torch.distributed."""
    import torch
    import torch.distributed as dist

    rank, ranks = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=rank, world_size=ranks)

    def of(size: int) -> Callable[[int], None]:
        tensor = torch.ones(size // 4)

        def call(_: int) -> None:
            dist.all_reduce(tensor)

        return call

    return rank, of


def by_mpi() -> tuple[int, Callable[[int], Callable[[int], None]]]:
    """Return the same by plain MPI."""
    import numpy as np
    from mpi4py import MPI

    def of(size: int) -> Callable[[int], None]:
        buffer = np.ones(size // 4, dtype=np.float32)
        return lambda _: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, buffer)

    return MPI.COMM_WORLD.rank, of


if __name__ == "__main__":
    main()
