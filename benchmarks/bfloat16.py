"""What a mean of bfloat16 over the ranks costs and loses: added by the engine, by the ranks, at each hop, and as fp32.

    python benchmarks/bfloat16.py --output benchmarks/results/bfloat16.txt

The ways: `fp32` sends gradients of bfloat16 as fp32; `engine` is Horovod's all-reduce of bfloat16 as the set-up edits
it (parts exchanged, added as fp32, rounded once); `ranks` does the same by an all-to-all and an all-gather of bits, as
it was before the engine could; `hops` is Horovod's all-reduce of float16, which MPI and Gloo round at each hop: what
bfloat16 would take if it were added like that.

Each number is the median of the calls of a launch, then over launches; they take turns. The error is the root mean
square of (mean - exact mean) over that of the exact mean, for normal numbers of bfloat16; of `hops` it is computed for
bfloat16, in the order of recursive doubling.
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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

NUMBERS = (1, 1 << 10, 1 << 14, 110_000, 1 << 20, 1 << 23)
WAYS = ("fp32", "engine", "ranks", "hops")


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=5, help="launches of each")
    parser.add_argument("--seconds", type=float, default=0.3, help="for a way and a size")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.seconds)
        return
    parts = [machine.describe(), f"load:     {os.getloadavg()[0]:.1f} in the minute before", ""]
    for ranks in given.ranks:
        for by in ("mpi", "gloo"):
            launches = [launch(by, ranks, given.seconds) for _ in range(given.repeats)]
            parts += [f"{ranks} ranks, {by}, {given.repeats} launches: milliseconds, and error", table(launches), ""]
            print("\n".join(parts[-3:]), flush=True)
            if given.output:  # also what is there so far: on a busy machine it takes long
                given.output.write_text("\n".join(parts))


def table(launches: list[dict[str, dict[str, list[float]]]]) -> str:
    """Return a row for each size: each way's median and worst launch, and its error."""
    rows = ["".join([f"{'numbers':>10}", *(f"{way:>30}" for way in WAYS)])]
    for count in NUMBERS:
        row = f"{count:>10}"
        for way in WAYS:
            times = [1e3 * one[way][str(count)][0] for one in launches]
            error = launches[0][way][str(count)][1]
            row += f"{f'{statistics.median(times):.3f} {max(times):.3f} {error:.1e}':>30}"
        rows.append(row)
    return "\n".join(rows)


def launch(by: str, ranks: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Start so many ranks that measure, and return the seconds and the error of each way, by the count of numbers."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks >= len(os.sched_getaffinity(0)):
        environ["OMPI_MCA_mpi_yield_when_idle"] = "1"
    start = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    if by == "gloo":
        start = ["horovodrun", "--gloo", "-np", str(ranks)]
    command = [*start, sys.executable, __file__, "--measure", "--seconds", str(seconds)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-3000:]}")
    (line,) = [line for line in done.stdout.splitlines() if "{" in line]
    found: dict[str, dict[str, list[float]]] = json.loads(line[line.index("{") :])
    return found


def measure(seconds: float) -> None:
    """Time all ways in this rank; the first one prints what it has seen. Collective."""
    import torch

    import hvdtrain
    from hvdtrain.world.codecs import codec_of
    from hvdtrain.world.horovod import HorovodWorld

    world = hvdtrain.init()
    assert isinstance(world, HorovodWorld)
    assert world.adds_bfloat16, "this Horovod was built before it knew bfloat16"

    class WithoutEngine(HorovodWorld):
        adds_bfloat16 = False

    codec = codec_of("bf16")

    def by_ranks(part: Tensor, name: str) -> Tensor:
        kind, world.__class__ = type(world), WithoutEngine
        wait = codec.start(world, "ranks", name, part.float().div_(world.size))
        world.__class__ = kind
        return wait()

    calls: dict[str, Callable[[Tensor, str], Tensor]] = {
        "fp32": lambda part, name: world.start_all_reduce_(part.float().div_(world.size), "sum", name)(),
        "engine": lambda part, name: world.start_all_reduce_(part, "mean", name)(),
        "ranks": by_ranks,
        "hops": lambda part, name: world.start_all_reduce_(part.half(), "mean", name)(),
    }
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for count in NUMBERS:
        all_parts = [
            torch.randn(count, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(world.size)
        ]
        exact = torch.stack(all_parts).double().mean(0)
        for way, call in calls.items():
            name = f"{way}.{count}"
            mean = call(all_parts[world.rank].clone(), name).bfloat16()
            if way == "hops":
                mean = at_each_hop(all_parts)
            error = float((mean.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
            times = []
            # As often on every rank: by the size alone.
            for _ in range(max(5, min(400, int(seconds / (1e-4 + count * 4e-9))))):
                part = all_parts[world.rank].clone()
                started = time.perf_counter()
                call(part, name)
                times.append(time.perf_counter() - started)
            found[way][str(count)] = [statistics.median(times), error]
    if world.rank == 0:
        print(json.dumps(found), flush=True)
    world.close()


def at_each_hop(parts: list[Tensor]) -> Tensor:
    """Return the mean of tensors of bfloat16, added in pairs of pairs, each sum rounded: by recursive doubling."""
    size = len(parts)
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0] / size


if __name__ == "__main__":
    main()
