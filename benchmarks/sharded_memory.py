"""What does the optimizer's state take on each rank with --optim.shard, against the formula, and what does the process?

    python benchmarks/sharded_memory.py --output benchmarks/results/sharded_memory.txt

AdamW over a stack of linear layers in fp32 on several ranks of this machine: 8 bytes of state a weight, divided by the
number of ranks. Counted are the bytes of the tensors that a rank's optimizer holds after some steps; measured is the
resident memory of the process then, sharded against not, in launches of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from hvdtrain.process.launch import prepare_process  # noqa: E402

prepare_process()  # threads, before torch starts

import machine  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import hvdtrain  # noqa: E402

MIB = 1 << 20
STEPS = 3


def resident_bytes() -> int:
    """Return the memory of this process that is in use now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def of_a_rank(layers: int, width: int, shard: bool) -> None:
    """Take some steps and print, on rank 0, what every rank holds. Collective."""
    world = hvdtrain.init()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=1e-3), model, shard=shard)
    for _ in range(STEPS):
        model(torch.ones(2, width)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    own = sum(value.nbytes for entries in optimizer.state.values() for value in entries.values())
    found = world.all_gather_object((own, resident_bytes()), "found")
    if world.rank == 0:
        weights = sum(parameter.numel() for parameter in model.parameters())
        print(json.dumps({"weights": weights, "ranks": found}), flush=True)


def launched(ranks: int, given: argparse.Namespace, shard: bool) -> dict:
    """Return what a launch of so many ranks has found."""
    words = ["--of-a-rank", "--layers", given.layers, "--width", given.width, *(["--shard"] if shard else [])]
    launch = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", ranks, sys.executable, __file__, *words]
    done = subprocess.run([*map(str, launch)], check=True, timeout=600, capture_output=True, text=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--of-a-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.of_a_rank:
        of_a_rank(given.layers, given.width, given.shard)
        return
    rows = []
    for ranks in given.ranks:
        whole, sharded = (launched(ranks, given, shard) for shard in (False, True))
        formula = 8 * whole["weights"] / ranks
        states = [state for state, _ in sharded["ranks"]]
        off = max(abs(state / formula - 1) for state in states)
        resident = [max(process for _, process in one["ranks"]) / MIB for one in (whole, sharded)]
        rows.append(
            f"{ranks:5}  {8 * whole['weights'] / MIB:9.2f}  {formula / MIB:9.2f}  {min(states) / MIB:8.2f} to"
            f" {max(states) / MIB:6.2f}  {off:7.2%}  {resident[0]:9.0f}  {resident[1]:9.0f}"
        )
        print(rows[-1], flush=True)
    text = "\n".join(
        (
            machine.describe(),
            "",
            f"AdamW, {whole['weights'] / 1e6:.1f}M weights in fp32; MiB a rank, after {STEPS} steps",
            "",
            "ranks      whole    formula        held, of each       off   resident memory of a process",
            "           state                          rank                  whole    sharded",
            *rows,
        )
    )
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
