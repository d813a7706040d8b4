"""What each rank writes of a checkpoint by itself: its part, and a receipt by which rank 0 knows that it is there.

    state-rank-000.pt      what rank 0 has for itself: pieces of the optimizer's state, its own states of components
    state-rank-001.pt      the same of rank 1, and so on

All ranks write to the folder that is to become the checkpoint. A part is flushed and read back, then its rank leaves a
receipt with its size and hash, or with the reason why there is none. Rank 0 waits for all receipts, puts them into the
manifest, and gives the folder its name: a checkpoint has all its parts, or does not exist.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hvdtrain.errors import CheckpointError
from hvdtrain.rundir.manifest import part_name
from hvdtrain.settings.files import flush_folder, flushed_sha256, replaced_whole, telling_why

_RECEIPT = ".receipt-"
_MARK = ".writing-mark-"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.2
# How long a network file system may take to show what another host has written.
_PATIENCE_S, _MARKS_PATIENCE_S = 30.0, 2.0
_logger = logging.getLogger("hvdtrain")


@dataclass(frozen=True)
class Receipt:
    """What a rank says of the part that it has written."""

    num_bytes: int = 0
    sha256: str = ""
    error: str = ""
    """Why there is none; empty: it is there."""


def write_part(folder: Path, rank: int, part: Mapping[str, Any]) -> Receipt:
    """Write a rank's part, flush it to disk, read it back and leave the receipt, which is returned. Raises nothing.

    Args:
        folder: to become the checkpoint; what it lies in must be there.
        rank: whose part it is.
        part: must load with `weights_only=True`.
    """
    path = folder / part_name(rank)
    try:
        folder.mkdir(exist_ok=True)
        with telling_why(path):
            torch.save(dict(part), path)
        receipt = Receipt(path.stat().st_size, flushed_sha256(path))
        # Mapped: structure and numbers are read, the tensors' bytes are not.
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        flush_folder(folder)
    except BaseException as error:  # of any type, sys.exit() too: whatever happens in a save must be known
        reason = str(error).strip().partition("\n")[0]
        reason = reason if isinstance(error, OSError) else f"{type(error).__name__}: {reason}"
        return leave_failure(folder, rank, f"{path.name} could not be written ({reason})")
    _leave(folder, rank, receipt)
    return receipt


def leave_failure(folder: Path, rank: int, error: str) -> Receipt:
    """Leave a receipt that says why a rank has no part, and return it."""
    _logger.error("a save failed on this rank: %s", error)
    receipt = Receipt(error=error)
    _leave(folder, rank, receipt)
    return receipt


def _leave(folder: Path, rank: int, receipt: Receipt) -> None:
    path = folder / f"{_RECEIPT}{rank:03d}"
    try:
        with replaced_whole(path) as temporary:
            temporary.write_text(json.dumps(asdict(receipt)))
    except OSError:  # a full disk has room for an empty file, which says as much
        with contextlib.suppress(OSError):
            path.touch()


@dataclass
class Receipts:
    """The receipts of all ranks for one save, as they come in on rank 0.

    They are looked for as files, so that a checkpoint is complete as soon as all ranks have written. What the ranks
    tell each other when they next meet, `tell`, is believed as well: a rank that could not even leave a receipt keeps
    nobody waiting.
    """

    folder: Path
    """To become the checkpoint."""
    size: int
    """Number of ranks."""
    _found: dict[int, Receipt] = field(default_factory=dict)
    _news: threading.Event = field(default_factory=threading.Event)
    _deadline: float | None = None

    def note(self, rank: int, receipt: Receipt) -> None:
        """Take a receipt."""
        self._found[rank] = receipt

    def tell(self, receipts: Sequence[Receipt | None]) -> None:
        """Take what every rank but this one has said of its part, whose writing has ended."""
        for rank, receipt in enumerate(receipts):
            if rank:
                self._found.setdefault(rank, receipt or Receipt(error="it has written no part"))
        self._news.set()

    def give_up(self, after_s: float) -> None:
        """Wait no longer than this for those that have not come: their ranks may be gone."""
        self._deadline = time.monotonic() + after_s
        self._news.set()

    def wait(self) -> dict[str, Receipt]:
        """Return the receipts by the names of the parts, all of which are there.

        Raises:
            CheckpointError: a rank has failed to write its part, or cannot be heard of.
        """
        pause = _FIRST_PAUSE_S
        while True:
            self._look()
            missing = [rank for rank in range(self.size) if rank not in self._found]
            if not missing:
                break
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise CheckpointError(f"rank {', '.join(map(str, missing))} did not say that its part is written")
            if pause >= _LONGEST_PAUSE_S:
                _ask_anew(self.folder)
            self._news.wait(pause)
            self._news.clear()
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        failed = [f"rank {rank}: {receipt.error}" for rank, receipt in sorted(self._found.items()) if receipt.error]
        if failed:
            raise CheckpointError(f"a part of the checkpoint cannot be written: {'; '.join(failed[:3])}")
        deadline = time.monotonic() + _PATIENCE_S
        for rank, receipt in self._found.items():
            path = self.folder / part_name(rank)
            while not path.is_file() or path.stat().st_size != receipt.num_bytes:
                if time.monotonic() > deadline:
                    raise CheckpointError(f"{path.name}, which rank {rank} has written, cannot be seen by rank 0")
                _ask_anew(self.folder)
                time.sleep(_LONGEST_PAUSE_S)
        return {part_name(rank): self._found[rank] for rank in range(self.size)}

    def _look(self) -> None:
        for path in self.folder.glob(f"{_RECEIPT}*"):
            number = path.name.removeprefix(_RECEIPT)
            if number.isdecimal() and int(number) not in self._found:
                self._found[int(number)] = _read(path)

    def clear(self) -> None:
        """Remove the receipts: what they say is in the manifest."""
        for path in self.folder.glob(f"{_RECEIPT}*"):
            path.unlink()


def _read(path: Path) -> Receipt:
    try:
        return Receipt(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        return Receipt(error="its part could not be written, nor why: its disk is full, or its log says more")


def _ask_anew(folder: Path) -> None:
    """Have a network file system look at a folder again: until something changes there, it may answer from memory."""
    path = folder / f"{_RECEIPT}look"
    with contextlib.suppress(OSError):
        path.touch()
        path.unlink()


def leave_mark(folder: Path, token: str, rank: int) -> None:
    """Leave a file that `seen_marks` looks for; none where `folder` is not there."""
    with contextlib.suppress(OSError):
        (folder / f"{_MARK}{token}-{rank}").touch()


def seen_marks(folder: Path, token: str, size: int) -> set[int]:
    """Return the ranks whose marks can be seen from here."""
    deadline, seen = time.monotonic() + _MARKS_PATIENCE_S, set[int]()
    while True:
        for path in folder.glob(f"{_MARK}{token}-*"):
            seen.add(int(path.name.rpartition("-")[2]))
        if len(seen) >= size or time.monotonic() > deadline:
            break
        _ask_anew(folder)
        time.sleep(_FIRST_PAUSE_S)
    return seen


def remove_mark(folder: Path, token: str, rank: int) -> None:
    """Remove what `leave_mark` has left."""
    with contextlib.suppress(OSError):
        (folder / f"{_MARK}{token}-{rank}").unlink()
