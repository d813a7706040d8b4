"""The log of a rank, read back: when it started, where it went on, what it warned of, and its last words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_HEAD = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)")
_CONTINUES = re.compile(r"continues at step ([\d,]{1,20}) of ")
_STEP = re.compile(r"\bstep ([\d,]{1,20})\b")
# Of a longer log the end is read: a run that went wrong may have filled it.
_MOST_BYTES = 1 << 22


@dataclass(frozen=True)
class Record:
    """What was logged at a time."""

    time: str
    level: str
    text: str
    """May have several lines."""

    @property
    def is_warning(self) -> bool:
        """Return whether it tells of something that a person should look at."""
        return self.level != "INFO" or self.text.lower().startswith("warning")


def read_records(path: Path) -> list[Record]:
    """Return the records of a rank's log.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    if path.exists() and not path.is_file():
        raise OSError(0, "it is no regular file")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _MOST_BYTES))
        lines = file.read(_MOST_BYTES).decode(errors="replace").splitlines()
    return [*records_of(lines)]


def records_of(lines: Sequence[str]) -> Iterator[Record]:
    """Yield the records that lines of a log make; what stands before the first head belongs to none."""
    head, text = None, []
    for line in lines:
        match = _HEAD.match(line)
        if match:
            if head:
                yield Record(head[1], head[2], "\n".join(text))
            head, text = match, [match[3]]
        elif head:
            text.append(line)
    if head:
        yield Record(head[1], head[2], "\n".join(text))


def restarts(records: Sequence[Record]) -> Iterator[tuple[int, str]]:
    """Yield the step at which a run went on, and when that was."""
    for record in records:
        match = _CONTINUES.match(record.text)
        if match:
            yield int(match[1].replace(",", "")), f"went on, {record.time}"


def warnings(records: Sequence[Record]) -> Iterator[tuple[int | None, str]]:
    """Yield what was warned of, and the step that it names, if it names one."""
    for record in records:
        if record.is_warning:
            match = _STEP.search(record.text)
            yield (int(match[1].replace(",", "")) if match else None), f"{record.time} {record.text}"


def last_words(records: Sequence[Record]) -> str:
    """Return what the last finished training said between its end and the name of its directory: samples, tables."""
    ends = [i for i, record in enumerate(records) if record.text.startswith("finished in ")]
    after = records[ends[-1] + 1 :] if ends else []
    said = [record.text for record in after if not record.text.startswith("everything is in ")]
    return "\n".join(said)
