"""Kill a supervised run again and again (kill -9: a random rank or its launcher), and see whether anything is lost.

    python benchmarks/kill_campaign.py --kills 200

Seven runs: three launchers, the tightest retention, state that is sharded over the ranks, which all write then, and a
disk that is full in the middle of every attempt. Kills strike while ranks start, train or save; a second one strikes
while the run is started again; the launcher's output may have lost its reader before; checkpoints are damaged,
and the next kill may strike just as a damaged one is replaced; the run goes on with another number of ranks. After each
kill every checkpoint that was not damaged on purpose must load and verify, and the newest of them may not be older than
before. At the end the weights, and the metrics of every step, must be bitwise those of a run that nothing happened to
and that changed its number of ranks at the same steps.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
from killed_run import KilledRun, Kind  # noqa: E402

MPIRUN = "mpirun --oversubscribe --bind-to none"
FULL_DISK = {"kind": "full disk", "rank": 0, "phase": "forward", "step": 8, "until": 40, "bytes": 3000}
RUNS = {
    "mpirun": Kind(MPIRUN),
    "horovodrun-mpi": Kind("horovodrun"),
    "horovodrun-gloo": Kind("horovodrun --gloo"),
    "tightest": Kind(MPIRUN, {"--checkpoint.keep-last": 1}, is_damaged=False),
    "sharded": Kind(MPIRUN, {"--optim.shard": ""}),
    "sharded-gloo": Kind("horovodrun --gloo", {"--optim.shard": ""}),
    "full-disk": Kind(MPIRUN, fault=FULL_DISK, is_damaged=False),
}


def main() -> int:
    """Run the campaign; exit code 0 only if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all, shared among the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="after so many, no more kills")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, help="also write the table here")
    given = parser.parse_args()
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="kill-campaign-"))

    def one(place: int, name: str) -> tuple[str, list[str], int]:
        kills = given.kills // len(given.runs) + (place < given.kills % len(given.runs))
        run = KilledRun(name, RUNS[name], folder, random.Random(f"{given.seed} {name}"))
        row = run.row(kills, started + 60 * given.minutes)
        return row, [f"{name}: {problem}" for problem in run.problems], sum(run.kills.values())

    with ThreadPoolExecutor(given.parallel) as pool:
        done = [*pool.map(one, range(len(given.runs)), given.runs)]
    rows, problems = [row for row, _, _ in done], [problem for _, found, _ in done for problem in found]
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"{sum(kills for _, _, kills in done)} kills (kill -9) of a rank or the launcher, restarted by"
            f" hvdtrain.process.supervise; {(time.monotonic() - started) / 60:.0f} minutes",
            "",
            "run             kills  torn  damaged  lost   ranks  steps   weights  metrics",
            "                      saves  by us         changed           bitwise equal to no kill",
            *rows,
        )
    )
    print(table)
    if given.output:
        given.output.write_text(table + "\n")
    if problems:
        print("\n".join((f"something was lost: look at {folder}", *problems)))
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
