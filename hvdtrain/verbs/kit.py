"""What the answers share: rank 0 speaks, numbers in words, rows with a verdict and a remedy, `--json`."""

from __future__ import annotations

import io
import json
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from hvdtrain import __version__
from hvdtrain.errors import ConfigError, DataError, counted, listed, reason_of

WIDTH = 116
"""Columns of an answer; longer lines are wrapped."""


class Speaker:
    """Writes lines on standard output, on the one rank that speaks; the others call it and stay silent.

    Args:
        speaks: whether this is that rank.
    """

    def __init__(self, speaks: bool) -> None:
        self.speaks = speaks

    def __call__(self, text: str) -> None:
        """Write `text` and the end of the line."""
        if self.speaks:
            write_line(text, sys.stdout)


def write_line(text: str, stream: TextIO) -> None:
    """Write in one piece: a launcher mixes the lines of ranks that write piece by piece."""
    stream.write(f"{text}\n")
    stream.flush()


def head_line(verb: str, recipe: str, num_ranks: int, *more: str) -> str:
    """Return an answer's first line: "hvdtrain 0.1.0: verify lm on 2 ranks, global batch 64"."""
    about = ", ".join([f"{verb} {recipe} on {counted(num_ranks, 'rank')}", *more])
    return f"hvdtrain {__version__}: {about}"


def ranks_text(ranks: Sequence[int]) -> str:
    """Return "rank 3" or "ranks 0, 1, 4"."""
    return f"rank{'s' * (len(ranks) != 1)} {listed(ranks)}"


def hanging(text: str, head: str) -> list[str]:
    """Return the lines of `text` behind `head`, the second and later ones indented by as much."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [head.rstrip()]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile; a lone value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range as a share of the median."""
    low, middle, high = quartiles(values)
    return (high - low) / middle


def in_brackets(values: tuple[float, float, float]) -> str:
    """Return quartiles as "1.020 [1.010, 1.050]"."""
    low, middle, high = values
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def standard_input() -> str:
    """Return the text of standard input, in the terminal's encoding; a byte order mark is left out.

    Raises:
        DataError: it is something else, or cannot be read.
    """
    if sys.stdin is None:
        return ""
    if isinstance(sys.stdin, io.TextIOWrapper):  # in the C locale Python lets anything pass
        sys.stdin.reconfigure(errors="strict")
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is no {sys.stdin.encoding.upper()} text (byte {error.start:,}): convert it before, as with"
            " iconv"
        ) from error
    except OSError as error:
        raise DataError(f"standard input cannot be read: {reason_of(error)}") from error


def check_json_path(path: Path | None) -> None:
    """Make the folder of a `--json` file, before minutes go into measuring what could not be written.

    Raises:
        ConfigError: it cannot be made, or the path is a directory.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, reason_of(error)) from error
    if path.is_dir():
        raise _unwritable(path, "it is a directory")


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """Write what `--json` asks for; None: nothing was asked.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise _unwritable(path, reason_of(error)) from error


def _unwritable(path: Path, why: str) -> ConfigError:
    return ConfigError(f"--json {path} cannot be written ({why}): name a file in a folder of yours")
