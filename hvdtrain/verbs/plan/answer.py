"""How many workers: predictions for 1, 2, 4, ... from what was measured, and the recommendation. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvdtrain.errors import counted
from hvdtrain.verbs.plan.comparison import MethodRow, compared
from hvdtrain.verbs.plan.comparison import recommended as recommended_method
from hvdtrain.verbs.plan.facts import Facts
from hvdtrain.verbs.plan.limits import changes_of, limit_of
from hvdtrain.verbs.plan.network import Layout
from hvdtrain.verbs.plan.rows import Row, relative_to, row_of

# The share by which a measured step may differ from what its parts explain.
_CONTRADICTS = 0.25


@dataclass(frozen=True)
class Answer:
    """The table and what follows from it."""

    facts: Facts
    rows: tuple[Row, ...]
    recommended: Row | None
    """None where the measurements contradict each other."""
    reason: str
    """Of the recommendation, or of there being none."""
    limit: str
    """What holds the largest number of workers back most."""
    changes: tuple[tuple[str, float], ...]
    """Settings and what the time to the same loss would be, relative to now, at `changed_workers`."""
    changed_workers: int
    """The recommended number, but at least two where there are."""
    unknown: str = ""
    """Why rows are missing."""
    methods: tuple[MethodRow, ...] = ()
    """Ways to average, for each number of workers of `rows` but one, exact averages first."""
    method: MethodRow | None = None
    """The way that is recommended at `method_workers`; None where there is one worker, or a contradiction."""
    method_reason: str = ""
    method_workers: int = 1
    """`changed_workers`; where these share a host, the fewest on several, if the network between them is known."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def worker_counts(to: int) -> list[int]:
    """Return 1, 2, 4, ... and the last one."""
    counts = [2**k for k in range(to.bit_length()) if 2**k <= to]
    return counts if counts[-1] == to else [*counts, to]


def answer(facts: Facts, to: int, price: float | None = None) -> Answer:
    """Predict 1, 2, 4, ... `to` workers.

    Args:
        facts: what was measured.
        to: the most workers.
        price: of a worker and hour.
    """
    rows, unknown = [], ""
    for workers in worker_counts(to):
        layout = Layout.of(workers, facts.ranks_per_host)
        if workers > 1 and (facts.network is None or not facts.network.covers(layout)):
            kind = "between hosts" if layout.hosts > 1 else "inside a host"
            unknown = (
                f"{workers} workers and more need the network {kind}, which was not measured: start plan on several"
                f" {'hosts' if layout.hosts > 1 else 'ranks'}, or describe it with --link 25gbit,5us"
            )
            break
        rows.append(row_of(facts, workers))
    first = rows[0]
    rows = [relative_to(first, row, facts, price) for row in rows]
    best, reason = _recommend(rows)
    changed = best if best.workers > 1 else rows[:2][-1]
    changes = changes_of(facts, changed)
    contradiction = _contradiction(facts, rows)
    recommended, reason = (None, contradiction) if contradiction else (best, reason)
    methods = {row.workers: compared(facts, row.workers) for row in rows}
    on_several_hosts = [row for row in rows if Layout.of(row.workers, facts.ranks_per_host).hosts > 1]
    averaged = changed if changed in on_several_hosts or not on_several_hosts else on_several_hosts[0]
    method, why = recommended_method(methods[averaged.workers])
    if contradiction:
        method, why = None, ""
    return Answer(
        facts,
        tuple(rows),
        recommended,
        reason,
        limit_of(facts, rows[-1]),
        changes,
        changed.workers,
        unknown,
        tuple(row for of_workers in methods.values() for row in of_workers),
        method,
        why,
        averaged.workers,
    )


def _contradiction(facts: Facts, rows: Sequence[Row]) -> str:
    """Say where a step of all ranks took another time than its parts explain; empty where it did not.

    The model was fitted to that very step as far as its parts allow, so what is left over is something that it does not
    know of.
    """
    for row in rows:
        measured = facts.measured_steps_s.get(row.workers)
        predicted = row.step.total_s
        if measured is not None and abs(measured / predicted - 1) > max(_CONTRADICTS, 2 * row.error):
            return (
                f"a step of {counted(row.workers, 'worker')} took {measured * 1e3:.4g} ms, and its parts, measured"
                f" by themselves, explain {predicted * 1e3:.4g} ms. Something else used the cores or the network"
                " meanwhile, or ranks share cores: `doctor` looks for that; then measure again"
            )
    return ""


def _recommend(rows: Sequence[Row]) -> tuple[Row, str]:
    """Return the knee: the most speed-up x efficiency, that is speed-up^2 / workers."""

    def speedup(row: Row) -> float:
        if row.relative_time is not None:
            return 1 / row.relative_time
        return row.efficiency * row.workers

    best = max(rows, key=lambda row: speedup(row) ** 2 / row.workers)
    what = "to the same loss" if best.relative_time is not None else "through the data"
    reason = f"{speedup(best):.2f} times as fast {what} as one worker, {speedup(best) / best.workers:.0%} of ideal"
    after = [row for row in rows if row.workers > best.workers]
    if after:
        gain = speedup(after[0]) / speedup(best)
        more = after[0].workers / best.workers
        reason += f"; {more:.3g} times the workers would be {gain:.2f} times as fast"
    elif len(rows) > 1:
        reason += "; the gain goes on: try a larger --to"
    return best, reason
