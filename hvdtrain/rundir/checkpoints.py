"""The checkpoints of a run: which there are, which is newest, best and to be kept. Rank 0 calls it.

    RUN_DIR/checkpoints/step-00000200/     a complete checkpoint, see `checkpoint`
    RUN_DIR/checkpoints/latest, best       names of the newest, and of the best by held-out loss

A checkpoint is written under a temporary name, flushed to disk, read back and renamed, and `latest` is replaced last:
at any moment `latest` names a complete checkpoint. Names that a user gave to copies are not ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hvdtrain.errors import CheckpointError, ResumeError, reason_of
from hvdtrain.process.run_files import BEST, LATEST, named_checkpoint
from hvdtrain.rundir.checkpoint import (
    Checkpoint,
    are_finite,
    load_checkpoint,
    read_back,
    verify_checkpoint,
    write_checkpoint,
)
from hvdtrain.rundir.manifest import Manifest, NewerFormatError, read_manifest
from hvdtrain.rundir.parts import Receipts
from hvdtrain.rundir.retention import Health, Retention, kept_steps
from hvdtrain.settings.files import flush_folder, write_flushed

_TEMPORARY = ".writing-"
# The name of a checkpoint while another one of the same step takes its place.
_REPLACED = ".replaced-"
# Eight digits, more from step 10^8 on. Any other name is a copy that the user made.
_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,17})", re.ASCII)


@dataclass
class Checkpoints:
    """The folder of a run's checkpoints."""

    folder: Path
    _damaged: set[int] = field(default_factory=set)
    """Steps of those that were found damaged since this process began."""
    _verified: dict[int, list[tuple[str, int, int, int]]] = field(default_factory=dict)
    """Identities of the files of those that were found good since this process began."""
    _has_saved: bool = False

    def path_of(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def folder_of_parts(self, step: int, token: str) -> Path:
        """Return where all ranks write a checkpoint of this step: by the token, no other save writes there."""
        return self.folder / f"{_TEMPORARY}{self.path_of(step).name}-{token}"

    def by_step(self) -> dict[int, Path]:
        """Return the complete checkpoints, oldest first. One that was half written has no name yet.

        Raises:
            ResumeError: the folder cannot be listed.
        """
        try:
            paths = [path for path in self.folder.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ResumeError(
                f"{self.folder} cannot be listed ({reason_of(error)}): make it a folder that can be read, or choose"
                " another --run-dir"
            ) from error
        found: dict[int, Path] = {}
        for path in sorted(paths, key=lambda path: path.name.startswith(_REPLACED)):
            match = _NAME.fullmatch(path.name.removeprefix(_REPLACED))
            if match:
                found.setdefault(int(match[1]), path)
        return dict(sorted(found.items()))

    def named(self, pointer: str) -> Path | None:
        """Return the checkpoint that `latest` or `best` names; None where it names none."""
        match = _NAME.fullmatch(named_checkpoint(self.folder.parent, pointer))
        return self.by_step().get(int(match[1]), self.folder / match[0]) if match else None

    def newest_manifest(self, *, is_whole: bool = True) -> Manifest | None:
        """Return what the checkpoint that `load_newest` would load says of itself; None without any that is good.

        Args:
            is_whole: verify the checkpoint, too; otherwise the newest is taken whose manifest is good.

        Raises:
            ResumeError: the folder cannot be listed.
        """
        for step, path in reversed(self.by_step().items()):
            with contextlib.suppress(CheckpointError):
                manifest = _manifest_of(step, path)
                if manifest.is_finite:
                    if is_whole:
                        self._verify(step, path)
                    return manifest
        return None

    def load_newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Read the newest checkpoint that is good; None without any. Warns of each that is passed over.

        Raises:
            CheckpointError: there are checkpoints, but none is good.
            ResumeError: a newer hvdtrain has written the newest, or the folder cannot be listed.
        """
        found = self.by_step()
        for step, path in reversed(found.items()):
            try:
                _manifest_of(step, path)
                checkpoint = load_checkpoint(path, is_verified=self._verified.get(step) == _identity(path))
                if checkpoint.manifest.is_finite:
                    return checkpoint
                warn(f"warning: {path} holds weights that are not finite; trying the one before it")
            except NewerFormatError as error:
                raise ResumeError(f"{error}, or choose another --run-dir") from error
            except CheckpointError as error:
                self._damaged.add(step)
                warn(f"warning: {error}; trying the one before it")
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {self.folder.parent} is good: choose another --run-dir"
            )
        return None

    def save(
        self,
        manifest: Manifest,
        weights: Mapping[str, Tensor],
        state: Mapping[str, Any],
        retention: Retention,
        *,
        parameters: frozenset[str] | None = None,
        warn: Callable[[str], None] = lambda text: None,
        receipts: Receipts | None = None,
    ) -> Path:
        """Write one checkpoint and read it back, point `latest` and `best`, and delete what need not be kept.

        The first one that a process saves is read back in whole.

        Args:
            manifest: what it shall say of itself; hashes, and whether weights are finite, are filled in.
            weights: by name, in host memory.
            state: everything else; must load with `weights_only=True`.
            retention: what is kept.
            parameters: names of the weights that must be finite; None for all.
            warn: takes what went wrong with others than this one.
            receipts: of the parts that all ranks write; None: `state` is all there is.

        Raises:
            CheckpointError: it could not be written, or would not load; what was there before is still good.
        """
        final = self.path_of(manifest.step)
        temporary = receipts.folder if receipts else self.folder / f"{_TEMPORARY}{final.name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if receipts is None:
                _remove(temporary)
            temporary.mkdir(exist_ok=receipts is not None)
            finite = are_finite(weights, frozenset(weights) if parameters is None else parameters)
            write_checkpoint(temporary, dataclasses.replace(manifest, is_finite=finite), weights, state, receipts)
            read_back(temporary, weights, is_whole=not self._has_saved)
            self._put(temporary, final)
            self._point(LATEST, final.name)
            flush_folder(self.folder)
        except Exception as error:  # of any type: whatever happens in a save must be known
            with contextlib.suppress(OSError):
                _remove(temporary)
            is_plain = isinstance(error, OSError | CheckpointError)
            reason = str(error) if is_plain else f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"checkpoint {final} could not be written ({reason}); earlier ones are intact"
            ) from error
        self._has_saved = True
        self._damaged.discard(manifest.step)
        self._tidy(manifest.step, retention, warn)
        return final

    def _verify(self, step: int, path: Path) -> None:
        """Make sure that a checkpoint is good, and note which files these were: loading need not hash them again.

        Raises:
            CheckpointError: it would not load.
        """
        identity = _identity(path)
        verify_checkpoint(path)
        self._verified[step] = identity

    def report(self) -> str:
        """Return which checkpoints are good, in a sentence."""
        try:
            health = {step: self._health(step, path)[0] for step, path in self.by_step().items()}
        except ResumeError as error:
            return str(error)
        good = [str(step) for step, state in health.items() if state == "good"]
        doubtful = [str(step) for step, state in health.items() if state == "doubtful"]
        text = f"Good checkpoints in {self.folder}: of step {', '.join(good)}" if good else "No checkpoint is good"
        if doubtful:
            text += (
                f"; those of step {', '.join(doubtful)} were saved after skipped steps or with weights that are not"
                " finite: remove them to train on from an earlier one"
            )
        return text

    def _health(self, step: int, path: Path) -> tuple[Health, Manifest | None]:
        try:
            manifest = _manifest_of(step, path)
        except CheckpointError as error:
            is_unknown = isinstance(error, NewerFormatError) or (
                isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
            )
            return ("unknown" if is_unknown else "damaged"), None
        if step in self._damaged:
            return "damaged", None
        return ("good" if manifest.is_healthy else "doubtful"), manifest

    def _put(self, temporary: Path, final: Path) -> None:
        """Give a new checkpoint its name; an earlier one of the same step keeps another until that is done."""
        replaced = final.with_name(f"{_REPLACED}{final.name}")
        if final.exists() or final.is_symlink():
            _remove(replaced)
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise

    def _tidy(self, newest: int, retention: Retention, warn: Callable[[str], None]) -> None:
        """Point `best`, delete what need not be kept, the oldest first, and what interrupted saves left behind."""
        try:
            found = {step: (path, *self._health(step, path)) for step, path in self.by_step().items()}
            losses = {
                step: manifest.val_loss
                for step, (_, health, manifest) in found.items()
                if health == "good" and manifest and manifest.val_loss is not None and math.isfinite(manifest.val_loss)
            }
            best = min(losses, key=lambda step: losses[step]) if losses else None
            if best is not None:
                self._point(BEST, self.path_of(best).name)
            kept = kept_steps({step: health for step, (_, health, _) in found.items()}, newest, retention)
            for step, (path, _, _) in found.items():
                if step not in kept and step != best:
                    _remove(path)
            for path in [*self.folder.glob(f"{_TEMPORARY}*"), *self.folder.glob(f"{_REPLACED}*")]:
                if path.name.startswith(_TEMPORARY) or path not in [item[0] for item in found.values()]:
                    _remove(path)
        except (OSError, ResumeError) as error:
            warn(f"WARNING: old checkpoints in {self.folder} cannot be tidied up ({error}); the new one is good")

    def _point(self, name: str, target: str) -> None:
        """Make the file `name` hold the name of a checkpoint, in one step."""
        temporary = self.folder / f"{_TEMPORARY}{name}"
        write_flushed(temporary, target + "\n")
        temporary.replace(self.folder / name)


def _manifest_of(step: int, path: Path) -> Manifest:
    """Read a checkpoint's manifest; it must be of the step that its name says."""
    manifest = read_manifest(path)
    if manifest.step != step:
        raise CheckpointError(f"{path} is damaged: its manifest is of step {manifest.step}")
    return manifest


def _identity(path: Path) -> list[tuple[str, int, int, int]]:
    """Return what changes when one of a checkpoint's files is replaced, written to or removed."""
    with contextlib.suppress(OSError):
        found = [(file.name, file.stat()) for file in sorted(path.iterdir())]
        return [(name, file.st_ino, file.st_size, file.st_ctime_ns) for name, file in found]
    return []


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        # Out of the way first: a half-deleted folder must not carry a checkpoint's name.
        doomed = path
        if not path.name.startswith(_TEMPORARY):
            doomed = path.with_name(f"{_TEMPORARY}old-{path.name}")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
