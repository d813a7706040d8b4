"""Errors that hvdtrain raises on purpose; each message says what to do next.

HvdtrainError                 exit code 1, a run that failed
├── UsageError                exit code 2, something the user can mend
│   ├── ConfigError           a flag, a key, or values that do not fit together
│   ├── DataError             missing, empty or unreadable data
│   ├── ResumeError           a run directory that does not fit this command
│   └── LaunchError           ranks, devices or launcher that do not fit together
├── WorkerError               a process that reads data has died or hangs
├── CheckpointError           a checkpoint that cannot be written or read
├── DivergedError             losses or gradients that are not finite, or ranks that are no longer equal
└── StopRequested             exit code 75, stopped on request after saving: start the same command again

The command line prints these as one message on rank 0 and ends every rank with `exit_code`; every other exception
keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

E = TypeVar("E", bound="HvdtrainError")


class HvdtrainError(Exception):
    """Base of all errors that hvdtrain raises on purpose."""

    exit_code = 1
    is_on_all_ranks = False
    """Whether every rank raises it at the same place. One that is not ends its rank, and with it the job."""
    stack = ""
    """Where in the user's own code it happened, printed after the message."""


class UsageError(HvdtrainError):
    """Something the user can mend: the message says how, on one line. Raised alike on all ranks."""

    exit_code = 2

    def __str__(self) -> str:
        # What users give may hold line breaks, or turn the direction of writing.
        text = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConfigError(UsageError):
    """A flag, a key, or values that do not fit together."""


class DataError(UsageError):
    """Data that is missing, empty or unreadable."""


class ResumeError(UsageError):
    """A run directory that does not fit this command."""


class LaunchError(UsageError):
    """Ranks, devices or launcher that do not fit together."""


class WorkerError(HvdtrainError):
    """A process that reads data has died or hangs."""


class CheckpointError(HvdtrainError):
    """A checkpoint that cannot be written or read."""


class DivergedError(HvdtrainError):
    """Losses or gradients that are not finite, or ranks that are no longer equal."""


class StopRequested(HvdtrainError):  # noqa: N818 - what happened is no error
    """The run was asked to stop and has saved; started again, it goes on. Raised on all ranks at the same step."""

    exit_code = 75


def on_all_ranks(error: E) -> E:
    """Return an error that all ranks raise at the same place: none of them ends the job before the others know.

    It is so where it is raised, not by its class: a user's own code may raise any of them, on one rank.
    """
    error.is_on_all_ranks = True
    return error


def reason_of(error: Exception) -> str:
    """Return why something could not be read, written or started: an OSError that Python itself raises has no text."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def one_line(error: BaseException, most: int = 300) -> str:
    """Return an error's own words on one line, cut to so many signs; its type where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def megabytes(num_bytes: float) -> str:
    """Return "10.9 MB", or "24.5 kB" and "20 B" of less: how messages say how large a text or an export is."""
    if num_bytes < 1e3:
        return f"{num_bytes:.0f} B"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"


def counted(number: float, noun: str) -> str:
    """Return "1 rank", "2 ranks", "1.5 cores": how every message counts."""
    digits = f"{number:,d}" if isinstance(number, int) else f"{number:g}"
    return f"{digits} {noun}{'s' * (number != 1)}"


def listed(items: Sequence[object], most: int = 8) -> str:
    """Return "a, b, c"; of more than `most` items the first ones and how many more there are."""
    left = len(items) - most
    return ", ".join(map(str, items[:most])) + (f" and {left} more" if left > 0 else "")
