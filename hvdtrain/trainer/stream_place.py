"""How far a stream has been read, so that a run goes on with the sample after the last one that was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from hvdtrain.data.stream import StreamSamples
from hvdtrain.trainer.component import Component, Step

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training


class StreamPlace(Component):
    """Saves the state of a stream at the step that is saved, though it has been read ahead; any rank's serves all."""

    name = "stream"
    is_replicated = False

    def __init__(self, job: Job, stream: StreamSamples) -> None:
        self._order, self._stream = job.order, stream
        self._step = 0

    @classmethod
    def of(cls, job: Job) -> StreamPlace | None:
        """Return one for training data that is a stream."""
        data = job.task.train_data
        return cls(job, data) if isinstance(data, StreamSamples) else None

    def begin(self, model: nn.Module) -> None:
        """Make sure, before there is anything to lose, that a checkpoint can hold the stream's state."""
        self._stream.check_state()

    def after_update(self, training: Training, step: Step) -> None:
        """Note which step comes next; one that was skipped has been read, too."""
        self._step = step.number

    def state_dict(self) -> dict[str, Any]:
        """Return the step, and how far the stream was when its next samples were not yet read."""
        return {"step": self._step, "place": self._stream.state_at(self._order.samples_before(self._step))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._step = state["step"]
        self._stream.go_on(state["place"])

    def redistribute(self, states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any]:
        """Return the first rank's: all ranks run through the same stream."""
        return states[0]
