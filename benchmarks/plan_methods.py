"""Does `plan` hold for every way to average, on networks drawn at random? Measure a few hosts, predict more, measure.

    python benchmarks/plan_methods.py --cluster CLUSTER.sh --seed 1 --draws 10 --output plan_methods.txt

CLUSTER.sh makes hosts of Linux namespaces: `up N --emu`, `net RATE DELAY_MS`, `exec HOST COMMAND...`, `down`. A draw is
a rate, a delay, a size of the model, a time of its layers, a controller, the hosts that are measured and those that are
predicted; the seed and its number alone decide it. Computing is sleep (benchmarks/sleeping_recipe.py), one rank a host.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
from plan_accuracy import RECIPE, on_hosts  # noqa: E402

from hvdtrain.verbs.plan.comparison import compared  # noqa: E402
from hvdtrain.verbs.plan.saved import load_json  # noqa: E402

MOST_HOSTS = 6
PERIOD = 6


@dataclass(frozen=True)
class Draw:
    """A setting."""

    rate_mbit: int
    delay_ms: float
    layer_kib: int
    sleep_ms: float
    controller: str
    base: int
    hosts: int

    @staticmethod
    def of(seed: int, number: int) -> Draw:
        """Return the setting of this number."""
        draws = random.Random(f"{seed}.{number}")

        def between(low: float, high: float) -> float:
            return math.exp(draws.uniform(math.log(low), math.log(high)))

        rate = round(between(20, 500))
        delay = round(between(0.2, 20), 1)
        # Eight layers, and never more than a link carries in 1.5 s.
        kib = min(1024, round(between(32, 1024)), int(rate * 1.5e6 / 8 / 8 / 1024))
        sleep = round(draws.uniform(4, 20), 1)
        controller = draws.choice(("mpi", "gloo"))
        base = draws.choice((2, 2, 3, 4))
        return Draw(rate, delay, kib, sleep, controller, base, draws.randint(base + 1, MOST_HOSTS))

    @property
    def flags(self) -> list[str]:
        """Return the recipe's."""
        return ["--layer-kib", str(self.layer_kib), "--sleep-ms", str(self.sleep_ms)]

    def __str__(self) -> str:
        return (
            f"{self.rate_mbit} Mbit/s, {self.delay_ms} ms, {8 * self.layer_kib / 1024:.2f} MiB, layers of"
            f" {self.sleep_ms} ms, {self.controller}, {self.hosts} hosts from {self.base}"
        )


def setting(given: argparse.Namespace, draw: Draw, folder: Path) -> tuple[list[str], list[tuple[float, bool]]]:
    """Return a row for each way to average, and the errors, with whether the interval holds what was measured."""
    plan = folder / "plan"
    more = [
        "--comm.sync",
        "local",
        "--comm.period",
        str(PERIOD),
        "--to",
        str(draw.hosts),
        "--noise-steps",
        "0",
        "--output",
        str(plan),
    ]
    on_hosts(given, draw.base, draw.controller, ["-m", "hvdtrain", "plan", str(RECIPE), *draw.flags, *more])
    script = str(REPOSITORY / "benchmarks" / "method_steps.py")
    times = folder / "times.json"
    on_hosts(given, draw.hosts, draw.controller, [script, str(RECIPE), str(times), str(PERIOD), *draw.flags])
    measured = json.loads(times.read_text())
    rows, errors = [str(draw)], []
    for row in compared(load_json(plan), draw.hosts):
        true = measured[row.method]
        error = row.step.total_s / true - 1
        errors.append((error, abs(true / row.step.total_s - 1) <= row.error))
        note = "   refused: its parts contradict it" if row.contradiction else ""
        rows.append(
            f"  {row.method:28} {1e3 * true:9.1f} {1e3 * row.step.total_s:9.1f} ± {row.error:4.0%} {error:+8.1%}{note}"
        )
    return rows, errors


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True, help="the script that makes the hosts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--work", type=Path, default=Path("plan-methods"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    body: list[str] = []
    errors: list[tuple[float, bool]] = []
    subprocess.run([given.cluster, "up", str(MOST_HOSTS), "--emu"], check=True)
    try:
        for number in range(given.first, given.first + given.draws):
            draw = Draw.of(given.seed, number)
            folder = given.work.resolve() / f"{given.seed}-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run([given.cluster, "net", f"{draw.rate_mbit}mbit", str(draw.delay_ms)], check=True)
            try:
                rows, found = setting(given, draw, folder)
            except (RuntimeError, subprocess.TimeoutExpired):
                rows, found = [f"{draw}: failed"], []
                print(traceback.format_exc()[-3000:], file=sys.stderr)
            print("\n".join(rows), file=sys.stderr, flush=True)
            body += [*rows, ""]
            errors += found
            _write(given, body, errors)
    finally:
        subprocess.run([given.cluster, "down"], check=False)


def _write(given: argparse.Namespace, body: list[str], errors: list[tuple[float, bool]]) -> None:
    """Write what there is so far: a campaign may be cut short."""
    sizes = [abs(error) for error, _ in errors]
    lines = [
        machine.describe(),
        "",
        f"draws of seed {given.seed}; local updates with a period of {PERIOD}; ms a step: measured, predicted, error",
        "",
        *body,
    ]
    if sizes:
        inside = sum(holds for _, holds in errors) / len(errors)
        lines.append(
            f"{len(sizes)} predictions: median error {statistics.median(sizes):.1%}, largest {max(sizes):.1%},"
            f" above 25 %: {sum(size > 0.25 for size in sizes)}; in the 90 % interval: {inside:.0%}"
        )
    if given.output:
        given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
