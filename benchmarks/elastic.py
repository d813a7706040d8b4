"""Lose hosts and gain hosts under a supervised run, and see what is lost: seconds, steps, samples.

    python benchmarks/elastic.py --output benchmarks/results/elastic.txt

Three hosts made of Linux namespaces on this machine (root, ssh and iproute2 are needed), a rank each, MPI, a small
network in fp64 whose steps sleep for `--pause` seconds, saved every `--every` steps. In each row something happens to
the hosts in mid-run. Noticed: seconds until the supervisor says something. Start: from a start of the launcher to
its first step, which the load of the machine decides. S lost: the longest time between two
new steps from then on, without the time of a step. Again: steps after the last save, whose work was lost and was done
once more. Samples: those of each step, in their order, are the ones of a run that nothing happens to. Weights: the
largest difference to that run's, of the largest weight.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests" / "support")]

import machine  # noqa: E402
from elastic_runs import RECIPE, ElasticRun, compare_samples  # noqa: E402
from hosts import Hosts, why_not  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

ALL = ["node1", "node2", "node3"]
OPTIONS = ["--look-every", "1", "--lost-after", "5", "--pause", "1"]
BIN = Path(sys.executable).parent


class Row:
    """One run and what happens to it."""

    def __init__(self, given: argparse.Namespace, hosts: Hosts, folder: Path, name: str) -> None:
        self.given, self.hosts, self.name = given, hosts, name
        self.folder = folder / re.sub(r"\W+", "-", name)  # --hosts-script is words, in which quotes mean something
        self.folder.mkdir()
        self.happened: list[tuple[float, int]] = []

    def start(self, listed: list[str], *options: str, **more: Any) -> ElasticRun:
        """Start the run and wait until it has saved."""
        settings = [*self.settings(), "--health.stall-limit", "60s"]
        self.run = ElasticRun(self.hosts, self.folder, listed, [*OPTIONS, *options], settings, **more)
        self.run.wait_for_step(self.given.every + self.given.every // 2)
        return self.run

    def settings(self) -> list[str]:
        """Return the recipe's settings."""
        given = self.given
        return [
            *("--train.steps", str(given.steps), "--pause", str(given.pause)),
            *("--checkpoint.every", str(given.every)),
        ]

    def happens(self, *actions: Callable[[], object]) -> None:
        """Do something to the hosts, note when, and wait until the run has got further."""
        reached, then = self.run.reached(), time.time()
        for action in actions:
            action()
        self.happened.append((then, reached))
        self.run.wait_for_step(min(reached + 3, self.given.steps))

    def line(self, expected: dict[int, list[int]], weights: dict[str, Any]) -> str:
        """Wait for the end, and return the row."""
        code = self.run.end()
        if code:
            raise RuntimeError(f"{self.name}: exit code {code}\n{self.run.output()[-5000:]}")
        starts = self.run.steps()
        again = compare_samples(starts, expected)
        ours = load_file(self.run.run_dir / "checkpoints" / f"step-{self.given.steps:08d}" / "model.safetensors")
        largest = max(float(tensor.abs().max()) for tensor in weights.values())
        difference = max(float((ours[name] - tensor).abs().max()) for name, tensor in weights.items()) / largest
        ranks = [str(len(steps[min(steps)])) for _, steps in sorted(starts.items())]
        self.show_lines()
        figures = (self.noticed(), self.starts(starts), self.lost(starts))
        noticed, start, lost = (" ".join(f"{seconds:.1f}" for seconds in each) for each in figures)
        ranks = "-".join(ranks)
        return f"{self.name:44}{ranks:>10}{noticed:>12}{start:>12}{lost:>14}{again:>7}   the same   {difference:8.1e}"

    def starts(self, starts: dict[int, dict[int, list[tuple[float, list[int]]]]]) -> list[float]:
        """Return the seconds from each start of the launcher but the first to its first step."""
        begun = [then for then, text in self.run.lines if "supervise: starting" in text]
        first = [min(then for parts in steps.values() for then, _ in parts) for _, steps in sorted(starts.items())]
        return [step - max(then for then in begun if then < step) for step in first[1:]]

    def show_lines(self) -> None:
        """Print what the supervisor has said, and when."""
        first = self.run.lines[0][0]
        for then, text in self.run.lines:
            if "supervise:" in text or text.startswith("hvdtrain"):
                print(f"    {then - first:6.1f} s  {text.rstrip()[:150]}", flush=True)
        for then, step in self.happened:
            print(f"    {then - first:6.1f} s  it happens, after step {step}", flush=True)

    def noticed(self) -> list[float]:
        """Return the seconds from each thing that happened to the supervisor's next word."""
        said = [then for then, text in self.run.lines if "supervise:" in text]
        return [min((word - then for word in said if word > then), default=0.0) for then, _ in self.happened]

    def lost(self, starts: dict[int, dict[int, list[tuple[float, list[int]]]]]) -> list[float]:
        """Return the seconds from each thing that happened to the first step that is new."""
        took: dict[int, float] = {}
        for steps in starts.values():
            for step, parts in steps.items():
                took[step] = min(took.get(step, float("inf")), max(then for then, _ in parts))
        found = []
        for then, _ in self.happened:
            before = max(step for step, at in took.items() if at <= then)
            gaps = [(took[step] - took[step - 1], step) for step in took if step > before and step - 1 in took]
            # The pause is the longest one before the next thing happens: growing waits for a save first.
            later = [other for other, _ in self.happened if other > then]
            gaps = [gap for gap, step in gaps if not later or took[step - 1] < later[0]]
            found.append(max(gaps) - self.given.pause)
        return found


def undisturbed(row: Row) -> tuple[dict[int, list[int]], dict[str, Any]]:
    """Return the samples of each step, and the weights, of a run on one rank that nothing happens to."""
    seen, run_dir = row.folder / "seen", row.folder / "run"
    seen.mkdir()
    command = [sys.executable, "-m", "hvdtrain", "train", str(RECIPE), "--run-dir", str(run_dir)]
    settings = ["--train.steps", str(row.given.steps)]
    environ = os.environ | {"SEEN": str(seen), "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*command, *settings], env=environ, check=True, capture_output=True, timeout=600)
    (file,) = seen.iterdir()
    lines = [line.split() for line in file.read_text().splitlines()]
    samples = {int(step): [*map(int, numbers)] for step, _, *numbers in lines}
    return samples, load_file(run_dir / "checkpoints" / f"step-{row.given.steps:08d}" / "model.safetensors")


def host_killed(row: Row) -> None:
    """A host's processes end; it comes back, and the run grows at its next save."""
    row.start(ALL)
    row.happens(lambda: row.hosts.kill("node3"))
    row.happens(lambda: row.hosts.boot("node3"))


def host_cut_off(row: Row) -> None:
    """Nothing comes from a host any more, and nobody is told."""
    row.start(ALL)
    row.happens(lambda: row.hosts.cut("node3"))
    row.hosts.heal("node3")


def first_rank_killed(row: Row) -> None:
    """The host of rank 0 ends; the supervisor is elsewhere and has no rank."""
    run = row.start(ALL[1:])
    row.happens(lambda: row.hosts.kill("node2"), lambda: run.set_listed(["node3", "node1"]))
    row.hosts.boot("node2")


def not_listed(row: Row) -> None:
    """A host is to leave: the list does not have it any more."""
    run = row.start(ALL)
    row.happens(lambda: run.set_listed(ALL[:2]))


def listed_anew(row: Row) -> None:
    """A host is listed that was not."""
    run = row.start(ALL[:2])
    row.happens(lambda: run.set_listed(ALL))


def on_request(row: Row) -> None:
    """The same, taken in when the supervisor gets SIGUSR2."""
    run = row.start(ALL[:2], "--grow", "request")
    run.set_listed(ALL)
    run.wait_for(lambda: run.said("when SIGUSR2 asks for it"), "the offer to grow")
    row.happens(lambda: run.signal(signal.SIGUSR2))


def both_at_once(row: Row) -> None:
    """One host ends in the moment in which another is listed."""
    run = row.start(ALL[:2])
    row.happens(lambda: row.hosts.kill("node2"), lambda: run.set_listed(ALL))
    row.hosts.boot("node2")


def too_few(row: Row) -> None:
    """Fewer than --min-ranks are left: it waits until the host is back."""
    run = row.start(ALL[:2], "--min-ranks", "2")
    row.hosts.kill("node2")
    run.wait_for(lambda: run.said("waiting for"), "waiting")
    time.sleep(2)
    row.happens(lambda: row.hosts.boot("node2"))


ROWS = {
    "a host is killed, and comes back": host_killed,
    "a host is cut off in silence": host_cut_off,
    "rank 0's host is killed, another is listed": first_rank_killed,
    "a host is not listed any more": not_listed,
    "a host is listed anew": listed_anew,
    "a host is listed anew, taken on request": on_request,
    "a host is killed as another is listed": both_at_once,
    "too few are left; the host comes back": too_few,
}


def main() -> int:
    """Run the campaign; exit code 0 only if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=10, help="steps between saves")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds that each step sleeps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after so many, no further row is begun")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--output", type=Path, help="also write the table here")
    given = parser.parse_args()
    if why_not():
        print(why_not())
        return 2
    lines, failed = [], []
    with tempfile.TemporaryDirectory(prefix="elastic-") as name:
        folder = Path(name)
        samples, weights = undisturbed(Row(given, None, folder, "undisturbed"))  # type: ignore[arg-type]
        deadline = time.monotonic() + 60 * given.minutes
        for title in given.rows:
            if time.monotonic() > deadline:
                lines.append(f"{title:44}not run, for want of time")
                continue
            with Hosts(3, path=f"{BIN}:/usr/local/bin:/usr/bin:/bin") as hosts:
                row = Row(given, hosts, folder, title)
                try:
                    ROWS[title](row)
                    lines.append(row.line(samples, weights))
                except (AssertionError, RuntimeError, TimeoutError) as error:
                    failed.append(f"{title}: {error}")
                    lines.append(f"{title:44}FAILED: {str(error).splitlines()[0][:80]}")
                finally:
                    row.run.kill()
                print((lines + failed)[-1] if not failed else failed[-1][-6000:], flush=True)
            if given.output:
                given.output.write_text(table(given, lines))
    print(table(given, lines))
    return 1 if failed else 0


def table(given: argparse.Namespace, lines: list[str]) -> str:
    """Return the text of the results file."""
    head = (
        f"supervise {' '.join(OPTIONS)}; 3 hosts, a rank each, mpirun; steps of {given.pause:g} s,"
        f" saved every {given.every}; load {os.getloadavg()[1]:.0f} of {len(os.sched_getaffinity(0))} cores"
    )
    titles = f"{'':44}{'ranks':>10}{'noticed':>12}{'start':>12}{'s lost':>14}{'again':>7}   samples    weights"
    return "\n".join((machine.describe(), "", head, "", titles, *lines, ""))


if __name__ == "__main__":
    sys.exit(main())
