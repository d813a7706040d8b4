"""Rows of the answer, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hvdtrain.errors import counted
from hvdtrain.verbs.kit import hanging
from hvdtrain.verbs.verify.compare import Difference

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


HEAD = f"    {'check':46} {'result':8} {'figure':40} tolerance"


def shown(row: Row) -> str:
    """Return a row as a person reads it, its advice below."""
    line = f"{row.number:3} {row.name:46} {row.status:8} {row.figure:40} {row.tolerance}".rstrip()
    return "\n".join([line, *(hanging(row.advice, " " * 8) if row.advice else [])])


def verdict(rows: Sequence[Row], seconds: float) -> str:
    """Return the last line: "2 FAILED, 1 warning, in 12 s"; checks that were not run are counted as that."""
    failed, skipped, warnings = (sum(row.status == status for row in rows) for status in ("FAIL", "not run", "warning"))
    result = f"{failed} FAILED" if failed else "all that were run passed" if skipped else "all checks passed"
    left_out = f", {counted(skipped, 'check')} not run" if skipped else ""
    return f"{result}{left_out}, {counted(warnings, 'warning')}, in {seconds:.0f} s"


def has_passed(rows: Sequence[Row]) -> bool:
    """Return whether no check failed; warnings are no failures."""
    return all(row.status != "FAIL" for row in rows)


def as_dict(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Return what `--json` writes."""
    return {**about, "passed": has_passed(rows), "rows": [asdict(row) for row in rows]}


def judged(number: int, name: str, found: Difference, tolerance: float, advice: str, figure: str) -> Row:
    """Return a check's row: a pass where the difference is within the tolerance. 0 stands for bitwise equality."""
    measured = found.relative if tolerance else found.absolute
    status: Status = "pass" if measured <= tolerance else "FAIL"
    text = f"relative {tolerance:.0e}" if tolerance else "bitwise"
    return Row(number, name, status, figure, text, "" if status == "pass" else advice, measured)


def warned(name: str, found: Difference, advice: str, figure: str) -> Row:
    """Return a row of check 8: a warning where there is any difference."""
    status: Status = "warning" if found.absolute else "pass"
    return Row(8, name, status, figure, "bitwise", advice if found.absolute else "", found.absolute)
