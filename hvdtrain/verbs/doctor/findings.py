"""What the checks say, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from hvdtrain.errors import counted
from hvdtrain.verbs.kit import hanging

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, the figure, and, where it is not ok, the command or variable that mends it."""

    status: Status
    what: str
    figure: str
    remedy: str = ""


def ok(what: str, figure: str) -> Finding:
    """Return a finding with nothing to mend."""
    return Finding("ok", what, figure)


def warning(what: str, figure: str, remedy: str) -> Finding:
    """Return a finding that costs speed, or may cost a run later."""
    return Finding("warning", what, figure, remedy)


def error(what: str, figure: str, remedy: str) -> Finding:
    """Return a finding with which training does not start, or trains wrongly."""
    return Finding("error", what, figure, remedy)


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 1 where there is an error, 0 otherwise."""
    return int(any(finding.status == "error" for finding in findings))


def table(findings: Sequence[Finding]) -> str:
    """Return one line a finding (longer ones are wrapped), the remedy below it, and a count."""
    width = max(len(finding.what) for finding in findings)
    lines: list[str] = []
    for finding in findings:
        head = f"{finding.status:<8} {finding.what:<{width}}  "
        lines += hanging(finding.figure, head)
        if finding.remedy:
            lines += hanging(finding.remedy, f"{'':<{len(head) - 2}}> ")
    errors, warnings, well = (sum(f.status == status for f in findings) for status in ("error", "warning", "ok"))
    lines.append(f"{counted(errors, 'error')}, {counted(warnings, 'warning')}, {well} ok")
    return "\n".join(lines)
