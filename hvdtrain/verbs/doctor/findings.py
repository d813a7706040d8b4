"""What the checks say, and how it is shown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error"]
_WIDTH = 116


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
        lines += _wrap(finding.figure, head)
        if finding.remedy:
            lines += _wrap(finding.remedy, f"{'':<{len(head) - 2}}> ")
    counts = {status: sum(finding.status == status for finding in findings) for status in ("error", "warning", "ok")}
    lines.append(
        ", ".join(f"{count} {status}{'s' * (count != 1 and status != 'ok')}" for status, count in counts.items())
    )
    return "\n".join(lines)


def ranks_text(ranks: Sequence[int]) -> str:
    """Return "rank 3" or "ranks 0, 1, 4"; of more than eight only the first."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) != 1)} {shown}"


def _wrap(text: str, head: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [head.rstrip()]
