"""Kill a supervised run again and again (kill -9: a random rank or its launcher), and see whether anything is lost.

    python benchmarks/kill_campaign.py --kills 100

Most kills wait until the ranks train, some strike while they start, some as soon as a checkpoint is being written.
After each, every checkpoint must load and verify, and the newest may not be older than before. At the end the weights,
and the metrics of every step, must be bitwise those of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
import torch  # noqa: E402

from hvdtrain.errors import HvdtrainError  # noqa: E402
from hvdtrain.process.marked import MARK, training_among  # noqa: E402
from hvdtrain.rundir.checkpoint import load_checkpoint  # noqa: E402

RECIPE = REPOSITORY / "tests" / "support" / "faulty_recipe.py"
LAUNCHERS = {
    "mpirun": ["mpirun", "--oversubscribe", "-np", "{n}"],
    "horovodrun-mpi": ["horovodrun", "-np", "{n}"],
    "horovodrun-gloo": ["horovodrun", "--gloo", "-np", "{n}"],
}
SETTINGS = (
    "--width",
    "20000",
    "--checkpoint.every",
    "2",
    "--checkpoint.keep-last",
    "3",
    "--eval.every",
    "100",
    "--pause",
    "0.01",
)
WAIT_S = 120


@dataclass
class Campaign:
    """One supervised run and what happened to it."""

    launcher: str
    ranks: int
    folder: Path
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    went_back: int = 0
    torn: int = 0
    """Kills that left a half-written checkpoint behind."""

    @property
    def run_dir(self) -> Path:
        """Return where the run lies."""
        return self.folder / self.launcher

    def command(self, *more: str, run_dir: Path | None = None) -> list[str]:
        """Return the launcher's command."""
        launch = [word.format(n=self.ranks) for word in LAUNCHERS[self.launcher]]
        train = ["train", str(RECIPE), "--run-dir", str(run_dir or self.run_dir), *SETTINGS, *more]
        return [*launch, sys.executable, "-m", "hvdtrain", *train]

    def run(self, kills: int) -> None:
        """Start the run under the supervisor and kill it so often; then let it save and stop."""
        options = ["--max-restarts", "1000", "--pause", "0.3"]
        command = self.command("--train.steps", "1000000")
        with (self.folder / f"{self.launcher}.log").open("w") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "hvdtrain.process.supervise", *options, "--", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                start_new_session=True,
            )
            try:
                for number in range(kills):
                    self.kill_one(supervisor.pid)
                    print(f"{self.launcher}: kill {number + 1} of {kills}, newest {newest(self.run_dir)}", flush=True)
                self.wait_for_training(supervisor.pid)
                supervisor.send_signal(signal.SIGTERM)
                supervisor.wait(WAIT_S)
            finally:
                end(supervisor)

    def kill_one(self, supervisor: int) -> None:
        """Choose a moment and a victim, strike, and look at what is left."""
        moment = self.chance.choices(("start-up", "training", "saving"), (1, 4, 3))[0]
        before = newest(self.run_dir)
        pids = wait_for(lambda: family(supervisor), "a start of the launcher")
        if moment == "start-up":
            time.sleep(self.chance.uniform(0, 4))
        else:
            pids = self.wait_for_training(supervisor)
            time.sleep(self.chance.uniform(0, 1.5))
        if moment == "saving":
            folder = self.run_dir / "checkpoints"
            wait_for(lambda: list(folder.glob(".writing*")), "a save", poll_s=0)
        pids = family(supervisor) or pids
        ranks = training_among(list(pids))
        launchers = [pid for pid in pids if pid not in ranks and stat_parent(pid) == supervisor]
        is_launcher = bool(launchers) and (not ranks or self.chance.random() < 0.25)
        victim = launchers[0] if is_launcher else self.chance.choice(ranks or pids)
        os.kill(victim, signal.SIGKILL)
        self.kills[f"{'launcher' if is_launcher else 'rank'}, {moment}"] += 1
        wait_for(lambda: not set(family(supervisor)) & set(pids), "the end of the killed job")
        self.inspect(before)

    def wait_for_training(self, supervisor: int) -> list[int]:
        """Wait until the ranks have saved once more."""
        before = newest(self.run_dir)
        wait_for(lambda: newest(self.run_dir) > before, "training")
        return family(supervisor)

    def inspect(self, before: int) -> None:
        """Load every checkpoint; the newest may not be older than before the kill."""
        folder = self.run_dir / "checkpoints"
        if not folder.is_dir():
            return
        self.torn += bool(list(folder.glob(".writing*")))
        for path in sorted(folder.glob("step-*")):
            try:
                load_checkpoint(path)
            except HvdtrainError as error:
                self.unreadable.append(str(error))
        self.went_back += newest(self.run_dir) < before

    def compare(self) -> tuple[int, bool, bool]:
        """Go on to a last step, and train to it once more without a kill: steps, weights equal, metrics equal."""
        last = str(newest(self.run_dir) + 20)
        whole = self.folder / f"{self.launcher}-whole"
        for run_dir, more in ((self.run_dir, []), (whole, ["--checkpoint.every", "1000000"])):
            command = self.command("--train.steps", last, *more, run_dir=run_dir)
            subprocess.run(command, check=True, timeout=3600, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
        ours, theirs = (
            load_checkpoint(path / "checkpoints" / f"step-{int(last):08d}") for path in (self.run_dir, whole)
        )
        same_weights = all(torch.equal(ours.weights[name], tensor) for name, tensor in theirs.weights.items())
        return int(last), same_weights, metrics(self.run_dir) == metrics(whole)


def newest(run_dir: Path) -> int:
    """Return the step of the checkpoint that `latest` names; -1 where there is none."""
    try:
        return int((run_dir / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    except (OSError, ValueError):
        return -1


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return each logged line without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key.split("/")[0] in ("step", "train", "val")} for line in lines
    ]


def family(supervisor: int) -> list[int]:
    """Return the processes that the supervisor has started, directly or not: those that carry its mark."""
    marked = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != supervisor:
            entries = read(int(path.name), "environ").split(b"\0")
            marked[int(path.name)] = next((entry for entry in entries if entry.startswith(MARK.encode())), b"")
    for pid, mark in marked.items():
        if mark and stat_parent(pid) == supervisor:
            _marks[supervisor] = mark  # orphans of a killed launcher have another parent, but the mark
    return sorted(pid for pid, mark in marked.items() if mark and mark == _marks.get(supervisor))


_marks: dict[int, bytes] = {}


def stat_parent(pid: int) -> int:
    """Return the parent of a process, 0 if it is gone."""
    words = read(pid, "stat").rpartition(b")")[2].split()
    return int(words[1]) if words else 0


def read(pid: int, name: str) -> bytes:
    """Return a file of /proc, empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def wait_for(condition, what: str, poll_s: float = 0.02):
    """Return what `condition` returns as soon as it is true.

    Raises:
        TimeoutError: that took too long.
    """
    deadline = time.monotonic() + WAIT_S
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_S} s for {what}")
        time.sleep(poll_s)
    return result


def end(supervisor: subprocess.Popen[bytes]) -> None:
    """End the supervisor, and what it started."""
    pids = family(supervisor.pid) if supervisor.poll() is None else []
    for pid in [supervisor.pid, *pids] if supervisor.poll() is None else []:
        os.kill(pid, signal.SIGKILL)
    supervisor.wait()


def main() -> int:
    """Run the campaign; exit code 0 only if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, shared among the launchers")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=list(LAUNCHERS))
    parser.add_argument("--output", type=Path, help="also write the table here")
    given = parser.parse_args()
    started, rows, is_good = time.monotonic(), [], True
    folder, problems = Path(tempfile.mkdtemp(prefix="kill-campaign-")), []
    for place, launcher in enumerate(given.launchers):
        kills = given.kills // len(given.launchers) + (place < given.kills % len(given.launchers))
        campaign = Campaign(launcher, given.ranks, folder, random.Random(f"{given.seed} {launcher}"))
        campaign.run(kills)
        steps, same_weights, same_metrics = campaign.compare()
        lost = len(campaign.unreadable) + campaign.went_back
        problems += campaign.unreadable
        is_good = is_good and not lost and same_weights and same_metrics
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(campaign.kills.items()))
        rows.append(
            f"{launcher:15} {kills:5} {campaign.torn:5} {len(campaign.unreadable):11} {campaign.went_back:9}"
            f" {steps:6}   {'yes' if same_weights else 'NO':8} {'yes' if same_metrics else 'NO':8}\n    {kinds}"
        )
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"kill -9 of a rank or the launcher, {given.ranks} ranks, restarted by hvdtrain.process.supervise;"
            f" {(time.monotonic() - started) / 60:.0f} minutes",
            "",
            "launcher        kills  torn  unreadable  went back  steps   weights  metrics",
            "                       saves checkpoints (lost run)         bitwise equal to no kill",
            *rows,
        )
    )
    print(table)
    if given.output:
        given.output.write_text(table + "\n")
    if is_good:
        shutil.rmtree(folder)
    else:
        print("\n".join((f"something was lost: look at {folder}", *problems)))
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
