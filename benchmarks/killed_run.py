"""A supervised run that is killed again and again, and what is found of it each time; see kill_campaign.py."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from supervised_processes import WAIT_S, Family, wait_for

from hvdtrain.errors import HvdtrainError
from hvdtrain.process.marked import training_among
from hvdtrain.rundir.checkpoint import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = REPOSITORY / "tests" / "support" / "faulty_recipe.py"
SETTINGS = {
    **{"--width": 20_000, "--pause": 0.01, "--eval.every": 100_000},
    **{"--checkpoint.every": 2, "--checkpoint.keep-last": 3},
}


@dataclass(frozen=True)
class Kind:
    """One of the runs."""

    launcher: str
    settings: dict[str, Any] = field(default_factory=dict)
    fault: dict[str, Any] = field(default_factory=dict)
    is_damaged: bool = True
    """Its checkpoints are damaged between kills: there is always one more."""


@dataclass
class KilledRun:
    """One supervised run and what happened to it."""

    name: str
    kind: Kind
    """What is done to it."""
    folder: Path
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    damaged: dict[Path, tuple[int, int]] = field(default_factory=dict)
    """What was damaged on purpose, and which folder that was: a later one of that name is another."""
    num_damaged: int = 0
    torn: int = 0
    """Kills that left a half-written checkpoint behind."""

    @property
    def run_dir(self) -> Path:
        """Return where the run lies."""
        return self.folder / self.name

    @property
    def log(self) -> Path:
        """Return where its output goes."""
        return self.folder / f"{self.name}.log"

    @property
    def ranks(self) -> Path:
        """Return the file that says how many ranks are started."""
        return self.folder / f"{self.name}-ranks"

    def train(self, run_dir: Path, steps: int, **more: Any) -> list[str]:
        """Return the words of training, without the launcher."""
        settings = {**SETTINGS, **self.kind.settings, "--train.steps": steps, **more}
        words = [str(word) for item in settings.items() for word in item if word != ""]
        return [sys.executable, "-m", "hvdtrain", "train", str(RECIPE), "--run-dir", str(run_dir), *words]

    def run(self, kills: int, deadline: float) -> None:
        """Start the run under the supervisor and kill it so often, or until then; then let it save and stop."""
        self.set_ranks(2)
        # The number of ranks is looked up at each start; the reader of the output can be killed on its own.
        launch = f'{self.kind.launcher} -np "$(cat {self.ranks})" "$@" 2>&1 | cat >> {self.log}'
        shell = [
            "bash",
            "-o",
            "pipefail",
            "-c",
            launch,
            "bash",
            *self.train(self.run_dir, 1_000_000),
        ]
        supervise = [sys.executable, "-m", "hvdtrain.process.supervise", "--max-restarts", "1000", "--pause", "0.1"]
        environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "FAULT": json.dumps(self.kind.fault)}
        with (self.folder / f"{self.name}-supervisor.log").open("w") as log:
            process = subprocess.Popen(
                [*supervise, "--", *shell], stdout=log, stderr=log, env=environ, start_new_session=True
            )
            family = Family(process.pid)
            try:
                while sum(self.kills.values()) < kills and time.monotonic() < deadline:
                    self.strike(family, kills - sum(self.kills.values()))
                    print(f"{self.name}: {sum(self.kills.values())} of {kills}, newest {self.newest()}", flush=True)
                self.wait_for_training()
                process.send_signal(signal.SIGTERM)
                process.wait(WAIT_S)
            finally:
                for pid in family.pids() if process.poll() is None else []:
                    os.kill(pid, signal.SIGKILL)
                process.kill()
                process.wait()

    def set_ranks(self, ranks: int) -> None:
        """From the next start on, have so many."""
        new = self.ranks.with_suffix(".new")
        new.write_text(str(ranks))
        new.replace(self.ranks)  # in one step: a launcher may be about to read it

    def strike(self, family: Family, most: int) -> None:
        """Choose a moment and a victim, strike, look at what is left; perhaps damage it, or strike again."""
        moments = {
            "start-up": 1,
            "training": 3,
            "saving": 3,
            "without reader": 2,
            "disk full": 3 * bool(self.kind.fault),
        }
        moment = self.chance.choices([*moments], [*moments.values()])[0]
        self.kill_one(family, moment)
        if self.newest() > 0 and self.chance.random() < 0.12:
            self.set_ranks(self.chance.choices((1, 2, 4), (6, 6, 1))[0])
        if self.kind.is_damaged and self.chance.random() < 0.3 and self.damage() and most > 1:
            self.kill_one(family, "replacing")
        elif most > 1 and self.chance.random() < 0.4:
            self.kill_one(family, "starting again")

    def kill_one(self, family: Family, moment: str) -> None:
        """Wait for the moment, kill a rank or the launcher, and inspect what is left."""
        before = self.newest()
        pids = wait_for(family.pids, "a start of the launcher")
        if moment in ("start-up", "starting again"):
            time.sleep(self.chance.uniform(0, 4))
        elif moment == "replacing":
            replaced = self.run_dir / "checkpoints"
            wait_for(lambda: [*replaced.glob(".replaced*")] or self.newest() > before + 20, "a replacement", poll_s=0)
        else:
            self.wait_for_training()
            time.sleep(self.chance.uniform(0, 1))
        if moment == "saving":
            wait_for(lambda: [*(self.run_dir / "checkpoints").glob(".writing*")], "a save", poll_s=0)
        pids = family.pids() or pids
        launcher, reader = family.pipeline()
        ranks = training_among([pid for pid in pids if pid != launcher])
        if moment == "without reader" and reader is not None:
            os.kill(reader, signal.SIGKILL)
            time.sleep(self.chance.uniform(0, 1.5))
        is_launcher = launcher is not None and (not ranks or moment == "without reader" or self.chance.random() < 0.25)
        victim = launcher if is_launcher else self.chance.choice(ranks or pids)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:  # it has ended meanwhile: that was no kill
            return
        self.kills[f"{'launcher' if is_launcher else 'rank'}, {moment}"] += 1
        wait_for(lambda: not set(family.pids()) & set(pids), f"the end of a job that was killed: {moment}")
        self.inspect(before)

    def wait_for_training(self) -> None:
        """Wait until the ranks have saved once more."""
        before = self.newest(), latest(self.run_dir)
        wait_for(lambda: (self.newest(), latest(self.run_dir)) > before and self.newest() > before[0], "training")

    def inspect(self, before: int) -> None:
        """Load every checkpoint; the newest may not be older than before the kill."""
        folder = self.run_dir / "checkpoints"
        self.torn += bool([*folder.glob(".writing*")])
        good = [-1]
        for path in sorted(folder.glob("step-*")):
            if self.is_damaged(path):
                continue
            try:
                good.append(load_checkpoint(path).manifest.step)
            except HvdtrainError as error:
                self.problems.append(f"unreadable: {error}")
        if max(good) < before:
            self.problems.append(f"went back: from {before} to {max(good)}")

    def newest(self) -> int:
        """Return the step of the newest checkpoint that was not damaged; -1 where there is none."""
        paths = (self.run_dir / "checkpoints").glob("step-*")
        return max((int(path.name[5:]) for path in paths if not self.is_damaged(path)), default=-1)

    def is_damaged(self, path: Path) -> bool:
        """Tell whether we have damaged this very folder."""
        try:
            return self.damaged.get(path) == identity(path)
        except OSError:
            return False

    def damage(self) -> bool:
        """Damage the newest checkpoint, or the newest two, if a good one remains; returns whether that was done."""
        good = sorted(path for path in (self.run_dir / "checkpoints").glob("step-*") if not self.is_damaged(path))
        count = self.chance.choice((1, 1, 2))
        if len(good) <= count:
            return False
        for path in good[-count:]:
            file = self.chance.choice(sorted(path.iterdir()))
            data = bytearray(file.read_bytes())
            place = self.chance.randrange(len(data))
            how = self.chance.choice(("bit", "cut", "gone"))
            if how == "gone":
                file.unlink()
            else:
                data[place] ^= 1 << self.chance.randrange(8)
                file.write_bytes(data if how == "bit" else data[:place])
            self.damaged[path] = identity(path)
            self.num_damaged += 1
        return True

    def segments(self, last: int) -> list[tuple[int, int]]:
        """Return (ranks, step at which they ended) of the run as it is now, without what was trained in vain."""
        begun: list[tuple[int, int]] = []
        ranks = 2
        for greeted, step in re.findall(
            r" on (\d+) ranks?, 1 host|continues at step ([\d,]+) of", self.log.read_text()
        ):
            if greeted:
                ranks = int(greeted)
            start = int(step.replace(",", "")) if step else 0
            if step or not begun:
                begun = [*((was, at) for was, at in begun if at < start), (ranks, start)]
        ends = [at for _, at in begun[1:]] + [last]
        joined: list[tuple[int, int]] = []
        for (number, _), end in zip(begun, ends, strict=True):
            joined = joined[:-1] if joined and joined[-1][0] == number else joined
            joined.append((number, end))
        return joined

    def compare(self) -> str:
        """Go on to a last step, and train to it once more without a kill; returns steps, and what is equal."""
        last = self.newest() + 20
        self.launch(self.run_dir, 2, last)
        whole, segments = self.folder / f"{self.name}-whole", self.segments(last)
        for ranks, step in segments:
            self.launch(whole, ranks, step, **{"--checkpoint.every": 1_000_000})
        ours, theirs = (load_checkpoint(path / "checkpoints" / f"step-{last:08d}") for path in (self.run_dir, whole))
        is_same = all(torch.equal(ours.weights[name], tensor) for name, tensor in theirs.weights.items())
        is_logged = _equal_but_for_seams(metrics(self.run_dir), metrics(whole), [step for _, step in segments[:-1]])
        if not (is_same and is_logged):
            self.problems.append(f"not the same: weights {is_same}, metrics {is_logged}, ranks and steps {segments}")
        changes = len(segments) - 1
        return f"{changes:7} {last:6}   {'yes' if is_same else 'NO':8} {'yes' if is_logged else 'NO':8}"

    def row(self, kills: int, deadline: float) -> str:
        """Kill so often, compare, and return what came of it; nothing that happens here stops the other runs."""
        outcome = "   ended before that"
        try:
            self.run(kills, deadline)
            outcome = self.compare()
        except (OSError, subprocess.SubprocessError, HvdtrainError, AssertionError) as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        counts = (sum(self.kills.values()), self.torn, self.num_damaged, len(self.problems))
        return f"{self.name:15}" + "{:6} {:5} {:8} {:5}".format(*counts) + f" {outcome}\n    {kinds}"

    def launch(self, run_dir: Path, ranks: int, steps: int, **more: Any) -> None:
        """Train without the supervisor and without a fault."""
        launch = [*self.kind.launcher.split(), "-np", str(ranks), *self.train(run_dir, steps, **more)]
        with self.log.open("a") as log:
            subprocess.run(launch, check=True, timeout=3600, stdout=log, stderr=log, cwd=REPOSITORY)


def identity(path: Path) -> tuple[int, int]:
    """Return what tells a folder from a later one of the same name."""
    return path.stat().st_ino, path.stat().st_ctime_ns


def latest(run_dir: Path) -> str:
    """Return what `latest` names."""
    try:
        return (run_dir / "checkpoints" / "latest").read_text()
    except OSError:
        return ""


def _equal_but_for_seams(ours: dict[int, Any], theirs: dict[int, Any], ends: list[int]) -> bool:
    """Compare, but for what the other run has logged more because it ended where ranks change.

    Its last step has a line of its own; the next line is then a mean of fewer steps.
    """
    for end in ends:
        if end in theirs and end not in ours:
            del theirs[end]
            after = min((step for step in ours if step > end), default=None)
            ours.pop(after, None)
            theirs.pop(after, None)
    return ours == theirs


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return what was logged of training at each step, without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        of_training = {key: value for key, value in line.items() if key.startswith("train/")}
        if of_training:
            assert line["step"] not in found, f"step {line['step']} is logged twice"
            found[line["step"]] = of_training
    return found
