"""The ways to average side by side on the measured network, and which one to take. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvdtrain.verbs.plan.costs import LossChange, loss_change
from hvdtrain.verbs.plan.facts import Facts, bytes_by, pace_of, predict_by
from hvdtrain.verbs.plan.formats import LEAST_PACE, MOST_PACE
from hvdtrain.verbs.plan.methods import Method, methods_of
from hvdtrain.verbs.plan.rows import error_of
from hvdtrain.verbs.plan.step import StepTime

# What a method may cost of the held-out loss, where it was measured, and be recommended.
WITHIN = 0.01
# A method that is faster by less is not worth another setting.
_WORTH = 1.05
# The share of a step by which what was measured of a format may differ from what its parts explain.
_NOTICED = 0.1


@dataclass(frozen=True)
class MethodRow:
    """A way to average on a number of workers."""

    method: str
    """As the table calls it."""
    flags: str
    """Settings of the command line, "" for the defaults."""
    workers: int
    step: StepTime
    """In the mean, where ranks do not average in every step."""
    error: float
    """Half the width of the 90 % interval of the step time, as a share of it."""
    units_per_s: float
    speedup: float
    """Over exact averages in every step."""
    bytes_per_step: int
    """That a rank hands over, in the mean."""
    loss: LossChange | None
    """What it did to the loss where that was measured; None where it was not."""
    contradiction: str
    """Why it is not recommended: training would refuse it, or what was measured of it is not what its parts explain; ""
    where there is nothing."""


def compared(facts: Facts, workers: int) -> list[MethodRow]:
    """Return the ways to average on so many workers, exact averages in every step first; none for one worker."""
    if facts.network is None or workers == 1 or not facts.formats:
        return []
    ways = methods_of(facts.compression, facts.period, facts.fragments, facts.overlap_steps)
    known = [method for method in ways if method.compression in facts.formats]
    known = sorted(known, key=lambda method: method != Method())
    exact = predict_by(facts, workers, Method()).total_s
    return [_row(facts, workers, method, exact) for method in known]


def _row(facts: Facts, workers: int, method: Method, exact_s: float) -> MethodRow:
    step = predict_by(facts, workers, method)
    samples = facts.micro_batch_size * facts.accum_steps * workers
    codec_s = facts.formats[method.compression].computes(workers) / (method.period or 1)
    return MethodRow(
        method=method.name,
        flags=method.flags,
        workers=workers,
        step=step,
        error=error_of(facts, workers, step, pace_of(facts, method), codec_s),
        units_per_s=samples * facts.units_per_sample / step.total_s,
        speedup=exact_s / step.total_s,
        bytes_per_step=bytes_by(facts, workers, method),
        loss=loss_change(method),
        contradiction=_contradiction(facts, method, exact_s),
    )


def _contradiction(facts: Facts, method: Method, exact_s: float) -> str:
    """Say where training refuses a way, or a format took longer over the ranks than its parts explain.

    Or less long; only where a step would notice.
    """
    refused = facts.refused.get(method.flags)
    if refused:
        return f"not with the recipe's other settings: {refused}"
    own = facts.formats[method.compression]
    if own.exchange_s is None or not own.explained_s:
        return ""
    ratio, difference = own.exchange_s / own.explained_s, abs(own.exchange_s - own.explained_s)
    if LEAST_PACE < ratio < MOST_PACE or difference < _NOTICED * exact_s * (method.period or 1):
        return ""
    return (
        f"all gradients took {own.exchange_s * 1e3:.4g} ms, and its parts, measured by themselves, explain"
        f" {own.explained_s * 1e3:.4g} ms: the network or the cores were busy; measure again"
    )


def recommended(rows: Sequence[MethodRow]) -> tuple[MethodRow | None, str]:
    """Return the fastest way that costs next to nothing of the loss where that was measured, and why.

    None where the exact ways were measured to be something else than what their parts explain.
    """
    if not rows:
        return None, ""
    exact = rows[0]
    if exact.contradiction:
        return None, f"{exact.method}: {exact.contradiction}"
    sound = [row for row in rows if not row.contradiction]
    cheap = [row for row in sound if row.loss is not None and row.loss.change <= WITHIN]
    best = max(cheap, key=lambda row: row.speedup)
    if best.speedup < _WORTH:
        best = exact
    reason = "exact" if best == exact else f"{best.speedup:.2f} times as fast as exact averages in every step"
    if best.loss is not None and best.loss.change:
        reason += f", for a held-out loss {best.loss} where it was measured ({best.loss.where})"
    faster = [row for row in sound if row.speedup > best.speedup * _WORTH]
    if faster:
        fastest = max(faster, key=lambda row: row.speedup)
        loss = "not measured" if fastest.loss is None else f"{fastest.loss} ({fastest.loss.where})"
        reason += f"; {fastest.method} would be {fastest.speedup:.2f} times as fast, with a loss {loss}"
    return best, reason
