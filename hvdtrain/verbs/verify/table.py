"""Rows of the answer, and how they are shown."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["pass", "FAIL", "warning", "not run"]


@dataclass(frozen=True)
class Row:
    """What one check found."""

    number: int
    """Of the check; a check may have several rows."""
    name: str
    status: Status
    figure: str
    """What was measured, as a person reads it."""
    tolerance: str = "0"
    """What it may be at most."""
    advice: str = ""
    """What to do, where it is not a pass."""
    value: float | None = None
    """The figure as a number, if it is one."""


def as_table(rows: list[Row], width: int = 118) -> str:
    """Return the rows below each other, advice indented under its row."""
    lines = [f"    {'check':46} {'result':8} {'figure':40} tolerance"]
    for row in rows:
        lines.append(f"{row.number:3} {row.name:46} {row.status:8} {row.figure:40} {row.tolerance}".rstrip())
        if row.advice:
            lines += textwrap.wrap(row.advice, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def as_dict(rows: list[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Return what `--json` writes."""
    return {**about, "passed": all(row.status != "FAIL" for row in rows), "rows": [asdict(row) for row in rows]}
