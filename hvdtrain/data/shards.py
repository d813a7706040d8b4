"""Samples in parquet files and in tar shards as WebDataset writes them, each reached by its number.

Which samples a rank reads is decided by their numbers, never by whole shards: the order does not depend on how many
ranks or shards there are. Files are listed by name and looked through once, at the start, by every process that reads.
"""

from __future__ import annotations

import bisect
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from hvdtrain.data.links import leads_nowhere, refuse_link
from hvdtrain.data.matching import matching
from hvdtrain.errors import DataError, reason_of

_GROUPS_AT_HAND = 4
_Member = tuple[str, int, int]  # extension, offset, length
_Sample = tuple[str, str, list[_Member]]  # shard, key, files


def shards_of(path: str | Path, suffix: str) -> list[Path]:
    """Return the files that a file, a directory or a glob names, sorted by name.

    Raises:
        DataError: there are none, or one is a link to what is not there.
    """
    place = Path(path).expanduser()
    named = [file for file in place.iterdir() if file.name.endswith(suffix)] if place.is_dir() else matching(place)
    for file in filter(leads_nowhere, named):
        refuse_link(file)
    found = [file for file in named if file.is_file()]
    if not found:
        raise DataError(f"{path} names no {suffix} files: give a file, a directory that holds some, or a glob")
    return sorted(found)


class ParquetSamples:
    """The rows of parquet files, a dictionary each. Give it to `Task` with a `collate` that makes batches of rows.

    A row group is read whole and kept for a while: files of small row groups (some thousand rows) are read fast in any
    order.

    Args:
        path: a file, a directory or a glob.
        columns: which ones to read; None: all.

    Raises:
        DataError: there are no files, they cannot be read, differ in their columns, or pyarrow is not installed.
    """

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None) -> None:
        self.files = shards_of(path, ".parquet")
        self.columns = None if columns is None else list(columns)
        self._groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        names: list[str] | None = None
        for file in self.files:
            metadata = self._open(file).metadata
            own = sorted({metadata.schema.column(i).path.partition(".")[0] for i in range(metadata.num_columns)})
            names = names if names is not None else own
            if own != names:
                raise DataError(
                    f"{file} has other columns ({', '.join(own)}) than {self.files[0]} ({', '.join(names)})"
                )
            self._groups += [(file, i) for i in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        missing = sorted(set(self.columns or ()) - set(names or ()))
        if missing:
            raise DataError(f"{self.files[0]} has no column {', '.join(missing)}; it has {', '.join(names or ())}")
        self._ends = list(accumulate(sizes))
        self._at_hand: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect.bisect_right(self._ends, index)
        table = self._table(group)
        row = index - (self._ends[group] - table.num_rows)
        return {name: table.column(name)[row].as_py() for name in table.column_names}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_at_hand": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _table(self, group: int) -> Any:
        with self._lock:
            if group not in self._at_hand:
                file, number = self._groups[group]
                self._at_hand[group] = self._read(file, number)
                if len(self._at_hand) > _GROUPS_AT_HAND:
                    self._at_hand.popitem(last=False)
            self._at_hand.move_to_end(group)
            return self._at_hand[group]

    def _read(self, file: Path, number: int) -> Any:
        try:
            return self._open(file).read_row_group(number, columns=self.columns)
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
            raise DataError(f"{file}, row group {number} cannot be read: {error}") from error

    def _open(self, file: Path) -> Any:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f"{file} needs pyarrow: pip install 'hvdtrain[data]'") from error
        try:
            return pyarrow.parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read as parquet: {error}") from error


class TarSamples:
    """The samples of tar shards as WebDataset writes them: files of one key, in one shard, are a sample.

    `images/0001.jpg` and `images/0001.cls` are the sample `images/0001` with the parts `jpg` and `cls`. Shards are
    looked through once and read in place, any sample at any time; compressed shards cannot be, and are refused.

    Args:
        path: a file, a directory or a glob.
        decode: makes a sample of its parts, `{"jpg": bytes, "cls": bytes, "__key__": "images/0001"}`. None: the parts
            as they are.

    Raises:
        DataError: there are no shards, or one cannot be read.
    """

    def __init__(self, path: str | Path, decode: Callable[[dict[str, Any]], Any] | None = None) -> None:
        self.files = shards_of(path, ".tar")
        self.decode = decode
        self._samples = [sample for file in self.files for sample in _samples_of(file)]
        if not self._samples:
            raise DataError(f"{path}: the shards hold no samples: a sample is one or more files named KEY.EXTENSION")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        if index < 0:
            raise IndexError(index)
        shard, key, members = self._samples[index]
        parts: dict[str, Any] = {"__key__": key}
        try:
            descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for extension, offset, length in members:
                    parts[extension] = os.pread(descriptor, length, offset)
                    if len(parts[extension]) != length:
                        raise DataError(f"{shard} is shorter than it was at the start: {key}.{extension} is cut off")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(f"{shard} cannot be read: {reason_of(error)}") from error
        return parts if self.decode is None else self.decode(parts)


def _samples_of(shard: Path) -> Iterator[_Sample]:
    """Yield the samples of a shard, in the order of their first files."""
    samples: dict[str, list[_Member]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                parts = samples.setdefault(key, [])
                if any(extension == other for other, _, _ in parts):
                    raise DataError(f"{shard} holds {member.name} twice: which one is meant cannot be known")
                parts.append((extension, member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shard} cannot be read as an uncompressed tar file: {error}") from error
    except OSError as error:
        raise DataError(f"{shard} cannot be read: {reason_of(error)}") from error
    yield from ((str(shard), key, parts) for key, parts in samples.items())
