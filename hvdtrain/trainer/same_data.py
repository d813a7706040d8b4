"""Ranks hold the same data, and a run goes on with the data that it began with."""

from __future__ import annotations

from typing import Any

from hvdtrain.data.fingerprint import Fingerprint, explain_change, explain_ranks, fingerprint_of
from hvdtrain.errors import DataError, on_all_ranks
from hvdtrain.trainer.job import Job


def compare_data(job: Job) -> dict[str, Fingerprint]:
    """Return what the data is known by, after it was compared between the ranks. Collective.

    Raises:
        DataError: on all ranks alike: ranks hold different data.
    """
    task, world = job.task, job.world
    parts = {"training": task.train_data, "held-out": task.val_data}
    parts.update({f"evaluation's ({number})": part.data for number, part in enumerate(task.evaluations, 1)})
    fingerprints = world.together(lambda: {name: fingerprint_of(data) for name, data in parts.items()}, "data")
    if world.agrees(fingerprints, "data"):
        return fingerprints
    problem = explain_ranks(world.all_gather_object(fingerprints, "data.fingerprints"))
    if problem:
        raise on_all_ranks(DataError(problem))
    return fingerprints


def explain_resume(job: Job, state: dict[str, Any], now: dict[str, Fingerprint]) -> str | None:
    """Return how the data differs from that of the run that was saved in `state`; None where it does not."""
    if "data" in job.allowed_changes:
        return None
    change = explain_change(state.get("data") or {}, now)
    if change is None and state["fingerprint"] != job.task.fingerprint:
        # The same samples where it was looked: a file of another name counts, by which texts are held out and ordered.
        change = "the training data, or the name of a file of it, is not the same"
    return f"{change} (data)" if change else None
