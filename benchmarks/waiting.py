"""How Open MPI waits, and how often Horovod looks: what each setting does to a step, ranks on all cores.

    python benchmarks/waiting.py --output benchmarks/results/waiting.txt

Both are variables that a process reads when it starts: every measurement is a launch of its own, and they take turns.
hvdtrain has MPI yield where ranks fill all cores (hvdtrain/launch.py) and leaves Horovod's cycle time at 1 ms.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
import speed  # noqa: E402

VARIANTS = {
    "as it is": {},
    "MPI polls": {"OMPI_MCA_mpi_yield_when_idle": "0"},
    "MPI sleeps": {"OMPI_MCA_threads_pthreads_yield_strategy": "nanosleep"},
    "cycle time 0.3 ms": {"HOROVOD_CYCLE_TIME": "0.3"},
    "cycle time 5 ms": {"HOROVOD_CYCLE_TIME": "5"},
}


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    shape = {"ranks": 2, "threads": 1, "layers": 6, "hidden_size": 256, "heads": 4, "intermediate_size": None}
    run = {"length": 128, "batch": 8, "precision": "fp32", "compile": "none", "controller": "mpi", "steps": 40}
    settings = argparse.Namespace(**shape, **run, tokens=None)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(given.repeats):
        for name, variables in VARIANTS.items():
            with mock.patch.dict(os.environ, variables):
                seconds[name].append(speed.launch("hvdtrain", settings))
            print(f"{name}: {1e3 * seconds[name][-1]:.1f} ms", file=sys.stderr, flush=True)
    ours = seconds["as it is"]
    rows = [
        f"{name:18} {machine.spread([1e3 * s for s in times], 1):24}"
        f" {machine.spread([s / base for s, base in zip(times, ours, strict=True)])}"
        for name, times in seconds.items()
    ]
    head = (
        "decoder of 6 layers x 256, 8 x 128 tokens a rank, 2 ranks of 1 thread, fp32, mpirun;"
        f" {given.repeats} interleaved launches of {settings.steps} steps; median [quartiles]"
    )
    title = f"{'':18} {'ms a step':24} against as it is"
    table = "\n".join((machine.describe(), "", head, "", title, *rows))
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
