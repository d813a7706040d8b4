"""The directory of a run: every path in it, and what is written there when training begins.

config.toml         the resolved settings            metrics.jsonl     one line of metrics each
environment.json    what the run ran on              logs/             a file for each rank
model/              what a reader of the weights     tensorboard/      event files, if asked for
                    needs beside them                checkpoints/      see `Checkpoints`
lock                who is training in it            trackers.json     what trackers call the run
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from hvdtrain.errors import ResumeError, reason_of
from hvdtrain.process.run_files import CHECKPOINTS, named_checkpoint
from hvdtrain.process.tracebacks import shown
from hvdtrain.rundir.lock import Claim, claim, claim_new
from hvdtrain.rundir.metrics import read_metrics
from hvdtrain.settings.files import remove_half_written, replaced_files, replaced_whole
from hvdtrain.settings.values import flat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from hvdtrain.rundir.checkpoint import Checkpoint
    from hvdtrain.rundir.checkpoints import Checkpoints
    from hvdtrain.rundir.manifest import Manifest


@dataclass(frozen=True)
class RunDirectory:
    """All files of one run, wherever it trains."""

    path: Path

    @classmethod
    def new(cls, recipe: str) -> RunDirectory:
        """Return where a run of this recipe goes that was given no directory; it is not made yet."""
        name = Path(recipe).stem if recipe.endswith(".py") else recipe
        return cls(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")

    def __str__(self) -> str:
        return shown(str(self.path))

    @property
    def config(self) -> Path:
        """Return the file of the resolved settings."""
        return self.path / "config.toml"

    @property
    def environment(self) -> Path:
        """Return the file that says what the run ran on."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """Return the file of metrics."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Return the folder of event files."""
        return self.path / "tensorboard"

    @property
    def trackers(self) -> Path:
        """Return the file of what trackers, such as W&B, call this run."""
        return self.path / "trackers.json"

    @property
    def logs(self) -> Path:
        """Return the folder of the ranks' log files."""
        return self.path / "logs"

    @property
    def lock(self) -> Path:
        """Return the file that says who trains in it, or did last."""
        return self.path / "lock"

    @property
    def model(self) -> Path:
        """Return the folder of what a reader of the weights needs: config.json and the tokenizer."""
        return self.path / "model"

    @property
    def export(self) -> Path:
        """Return where an export goes that was given no directory."""
        return self.path / "export"

    @property
    def report(self) -> Path:
        """Return the page that shows the run, where one was written."""
        return self.path / "report.html"

    @property
    def timeline(self) -> Path:
        """Return the file of `--profile.timeline`, where it was given."""
        return self.path / "timeline.json"

    def rank_log(self, rank: int) -> Path:
        """Return the log file of a rank."""
        return self.logs / f"rank-{rank:03d}.log"

    def read_settings(self) -> dict[str, Any]:
        """Return the resolved settings by full name, such as `train.steps`; empty where there are none to be read."""
        try:
            return flat(tomllib.loads(self.config.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Return the checkpoints."""
        from hvdtrain.rundir.checkpoints import Checkpoints  # with torch, which who only looks at a run does without

        return Checkpoints(self.path / CHECKPOINTS)

    def claim_new(self) -> Claim:
        """Make and lock a directory of this name, or with a number behind it, that was not there before.

        Raises:
            ConfigError: the directory cannot be made.
        """
        return claim_new(self.path)

    def claim(self) -> Claim:
        """Make the directory and lock it.

        Raises:
            ResumeError: another run holds it.
            ConfigError: the directory cannot be made.
        """
        return claim(self.path)

    def load_newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Read the newest checkpoint that is good; None where none was ever saved. Warns of each that is passed over.

        Raises:
            CheckpointError: there are checkpoints, but none is good.
            ResumeError: checkpoints that were there are not, or cannot be listed.
        """
        checkpoint = self.checkpoints.load_newest(warn)
        if checkpoint is None:
            self._check_nothing_is_missing(warn)
        return checkpoint

    def newest_outline(self, warn: Callable[[str], None]) -> tuple[Manifest, dict[str, Any]] | None:
        """Return what `load_newest` would read, but for the tensors: the manifest, and the state, left on disk.

        Raises:
            CheckpointError, ResumeError: as `load_newest`.
        """
        manifest, steps = self.checkpoints.newest_manifest(), [*self.checkpoints.by_step()]
        if manifest is None or manifest.step != steps[-1]:
            self.load_newest(warn)  # says which are passed over
        if manifest is None:
            return None
        from hvdtrain.rundir.checkpoint import load_outline  # with torch, as above

        return manifest, load_outline(self.checkpoints.path_of(manifest.step))

    def _check_nothing_is_missing(self, warn: Callable[[str], None]) -> None:
        """Raise ResumeError where there is no checkpoint, but has been one; starting over would drop its metrics."""
        folder = self.checkpoints.folder
        named = named_checkpoint(self.path)
        if named:
            raise ResumeError(
                f"{folder} has no checkpoints, but names {named!r} as the latest: put it back, or choose another"
                " --run-dir"
            )
        last = self._last_logged_step()
        if not last:
            return
        if not folder.exists():
            raise ResumeError(
                f"{folder} is missing, but {self.metrics} goes up to step {last}: put it back, choose another"
                " --run-dir, or remove the metrics to start over"
            )
        warn(
            f"warning: no checkpoint had been saved in {self.path} when its metrics ended at step {last}: training"
            " starts from step 0 again, and they are replaced"
        )

    def _last_logged_step(self) -> int:
        try:
            lines, _ = read_metrics(self.metrics)
        except OSError as error:
            raise ResumeError(
                f"{self.metrics} cannot be read ({reason_of(error)}): choose another --run-dir"
            ) from error
        return max((line["step"] for line in lines), default=0)

    def begin(
        self,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        write_model_files: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Write what says what is trained and on what; a run that goes on replaces it.

        Args:
            settings: resolved, as TOML can hold them.
            environment: as from `describe_environment`.
            write_model_files: writes to the folder `model` what a reader of the weights needs.

        Raises:
            OSError: something cannot be written; what was there before is whole.
        """
        remove_half_written(self.path)
        # Made now: a run that finds metrics and no such folder knows that someone has taken it away.
        self.checkpoints.folder.mkdir(exist_ok=True)
        with replaced_whole(self.config) as temporary:
            temporary.write_text(tomli_w.dumps(settings), encoding="utf-8")
        with replaced_whole(self.environment) as temporary:
            temporary.write_text(json.dumps(environment, indent=2) + "\n")
        with replaced_files(self.model) as folder:
            write_model_files(folder)


class Whereabouts:
    """Notices that the directory of a run is another than it was: a save makes it anew, and nobody would know.

    Args:
        run: that trains.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self.note()

    def note(self) -> None:
        """Take what is there now for the run's own."""
        self._identity = self._look()

    def warn(self, say: Callable[[str], None]) -> None:
        """Say it if another directory is there now, or none."""
        if self._identity is not None and self._look() != self._identity:
            say(
                f"WARNING: {self._run} was moved or removed while it was trained: checkpoints are written there anew;"
                " what was in it before, such as settings, metrics and logs, is lost, or where it was moved to"
            )

    def _look(self) -> tuple[int, int] | None:
        try:
            found = self._run.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino
