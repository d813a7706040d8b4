"""What a checkpoint holds, where a run goes on by settings or code that have no use for it: said, and dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hvdtrain.trainer.component import Component

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job


# That they are missing follows from the number of ranks, and is no loss: or is told by whoever stands in for them.
_TOLD_ELSEWHERE = {"bucket_order", "outer"}


def dropped_lines(components: Sequence[Component], states: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line about saved states that no component takes, if there are any.

    Args:
        components: of the run that goes on.
        states: of the checkpoint, by the components' names.
    """
    names = sorted(states.keys() - {component.name for component in components} - _TOLD_ELSEWHERE)
    if names:
        yield (
            f"WARNING: the checkpoint also holds the state of {', '.join(names)}: this run, by its settings and code,"
            " has no such part, and it is dropped"
        )


class LeftBehind(Component):
    """Stands in for a component that the job does not have, and says what becomes of its state.

    Args:
        job: what is trained.
        name: the component's.
        has: what so many ranks did, to follow their number.
        goes_on: how the run goes on without it.
    """

    is_replicated = False

    def __init__(self, job: Job, name: str, has: str, goes_on: str) -> None:
        self.name = name
        self._size, self._say = job.world.size, job.log.say
        self._has, self._goes_on = has, goes_on

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Say it, where as many ranks had saved."""
        self._tell(self._size)

    def redistribute(self, states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any] | None:
        """Say it, where another number of ranks had."""
        self._tell(len(states))
        return None

    def _tell(self, count: int) -> None:
        then = "one goes on" if self._size == 1 else f"{self._size} go on"
        self._say(f"WARNING: {count} ranks {self._has}, and {then}{self._goes_on}")


def own_progress(job: Job) -> LeftBehind | None:
    """Return what says it of local updates, where gradients are averaged in every step."""
    if not job.strategy.agrees:
        return None
    every_step = "" if job.world.size == 1 else " averaging gradients in every step"
    return LeftBehind(
        job,
        "own_progress",
        "have trained apart",
        f"{every_step}: from the mean of their weights, with the optimizer's state of rank 0, and nothing of the outer"
        " optimizer or of what was still to send",
    )


def unsent_gradients(job: Job) -> LeftBehind | None:
    """Return what says it of what a codec remembers of gradients, where updates are averaged instead."""
    if job.strategy.agrees:
        return None
    return LeftBehind(
        job, "codec", "had a part of their gradients still to send", " by --comm.sync local: it is dropped"
    )
