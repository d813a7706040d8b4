"""Held-out loss against wall time and against bytes on slow links, for each way to average.

    python benchmarks/loss_against_time.py --cluster CLUSTER.sh --steps 1600 --seeds 1 --period 8

The loss after so many steps does not depend on the network, and the time of a step does not depend on the loss: each
method is trained once on the ranks of this machine, evaluated every so many steps, and timed on throttled hosts as in
slow_links.py, whose arguments these are. Bytes are those that a rank has handed to its collectives, as the run logs
them. DistributedDataParallel makes the updates of "every step", so that its losses are those; its hooks are left out.

Then for each network: minutes, and bytes, to a held-out loss a little above the one with which "every step" ends;
between two evaluations it is taken to fall on a straight line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import slow_links  # noqa: E402

PLAIN, PEER = "every step", "DDP, Gloo"
COLUMNS = 7


class Point(NamedTuple):
    """A training at an evaluation."""

    step: float
    loss: float
    """Held out, in nats a byte."""
    num_bytes: float
    """That a rank has sent so far."""


def curve_of(lines: list[dict[str, float]]) -> list[Point]:
    """Return the evaluations of a run with what had been sent by then, from what it has logged."""
    points, sent, last = [], 0.0, 0.0
    for line in lines:
        if "comm/bytes_per_step" in line:
            sent += line["comm/bytes_per_step"] * (line["step"] - last)
            last = line["step"]
        if "val/loss" in line:
            points.append(Point(line["step"], line["val/loss"], sent))
    return points


def reaching(curve: list[Point], wanted: float) -> Point | None:
    """Return where a curve first comes down to a loss, None where it does not."""
    for before, after in itertools.pairwise(curve):
        if after.loss <= wanted:
            share = 0.0 if before.loss <= wanted else (before.loss - wanted) / (before.loss - after.loss)
            return Point(*(a + share * (b - a) for a, b in zip(before, after, strict=True)))
    return None


def curves(given: argparse.Namespace) -> dict[str, list[Point]]:
    """Return each method's curve, the mean over the seeds."""
    found = {}
    every = ["--eval.every", str(given.eval_every), "--log.every", str(given.eval_every)]
    for name, flags in slow_links.methods(given, given.warmup).items():
        if name != PLAIN and not slow_links.wanted(given, name):
            continue
        of_seeds = []
        for seed in range(given.seeds):
            with tempfile.TemporaryDirectory() as folder:
                lines = slow_links.train_here(given, [*flags, *every], seed, Path(folder) / "run")
            of_seeds.append(curve_of(lines))
            print(f"seed {seed}: {name} {of_seeds[-1][-1]}", file=sys.stderr, flush=True)
        found[name] = [Point(*map(statistics.mean, zip(*at, strict=True))) for at in zip(*of_seeds, strict=True)]
    return found


def kept_curves(given: argparse.Namespace) -> dict[str, list[Point]]:
    """Return the curves from the file that is named, or measure them, and keep them there."""
    if given.curves and given.curves.exists():
        return {name: [Point(*at) for at in curve] for name, curve in json.loads(given.curves.read_text()).items()}
    found = curves(given)
    if given.curves:
        given.curves.write_text(json.dumps(found))
    return found


def loss_rows(given: argparse.Namespace, found: dict[str, list[Point]]) -> list[str]:
    """Return the table of the losses by steps."""
    shown = [point.step for point in found[PLAIN]]
    shown = [shown[round(i * (len(shown) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
    rows = [
        f"held-out loss in nats a byte by steps, {given.hosts} ranks, seeds: {given.seeds}; what a rank has sent",
        f"{'':38} {' '.join(f'{step:8,.0f}' for step in shown)}        MB",
    ]
    for name, curve in found.items():
        at = {point.step: point.loss for point in curve}
        losses = " ".join(f"{at[step]:8.4f}" for step in shown)
        rows.append(f"{name:38} {losses} {curve[-1].num_bytes / 1e6:9,.1f}")
    return rows


def time_rows(given: argparse.Namespace, found: dict[str, list[Point]], times: slow_links.Times) -> list[str]:
    """Return, for each network, what each method takes to the loss that is asked for."""
    wanted = found[PLAIN][-1].loss * (1 + given.above)
    goal = f"{wanted:.4f} nats, {given.above:.0%} above the end of {PLAIN!r}"
    what = f"to {goal}: steps, minutes, MB, DDP's minutes / these"
    rows = []
    for network, seconds in times.seconds.items():
        rate, delay = network.split(",")
        rows += ["", f"{rate}, {delay} ms one way, {given.hosts} hosts: ms a step; {what}"]
        of_peer = None
        for name in (PEER, *found):
            if not (measured := seconds.get(name)):
                continue
            step_s = statistics.median(measured)
            row = f"{name:38} {1e3 * step_s:8.1f}"
            if (reached := reaching(found[PLAIN if name == PEER else name], wanted)) is None:
                rows.append(f"{row}   not reached in {given.steps:,} steps")
                continue
            minutes = reached.step * step_s / 60
            of_peer = minutes if name == PEER else of_peer
            sent = "" if name == PEER else f"{reached.num_bytes / 1e6:,.1f}"
            ratio = f"{of_peer / minutes:.2f}" if of_peer else ""
            rows.append(f"{row} {reached.step:8,.0f} {minutes:8.2f} {sent:>9} {ratio:>7}")
    return [*rows, *times.failed]


def main() -> None:
    """Measure, print and write down."""
    parser = slow_links.make_parser(__doc__)
    parser.add_argument("--eval-every", type=int, default=80, help="steps, a multiple of the period")
    parser.add_argument("--curves", type=Path, help="losses are kept there, and taken from there: times may come later")
    parser.add_argument("--above", type=float, default=0.02, help="the loss to reach: this share above every step's")
    given = parser.parse_args()
    if given.eval_every % given.period:
        sys.exit(
            f"--eval-every {given.eval_every} must be a multiple of --period {given.period}: an evaluation averages"
        )
    found = kept_curves(given)
    table = [*slow_links.head(given), *loss_rows(given, found)]
    slow_links.write(given, table)
    if given.cluster:
        table += time_rows(given, found, slow_links.timed(given, table))
    print("\n".join(table))
    slow_links.write(given, table)


if __name__ == "__main__":
    main()
