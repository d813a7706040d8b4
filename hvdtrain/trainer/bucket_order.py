"""The order in which gradients travel: that in which backward finishes them, learned in the first step of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hvdtrain.trainer.component import Component
from hvdtrain.trainer.strategy import EveryStep
from hvdtrain.world import WrappedOptimizer

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training


def gradients_are_views(job: Job) -> bool:
    """Return whether gradients lie in the buffers that are sent: on GPUs, whose memory is short.

    On CPUs to write them there in one go, divided by the number of ranks, is faster.
    """
    return job.world.device.type == "cuda" and job.config.comm.op == "average" and not job.config.optim.shard


def follows_backward(job: Job) -> bool:
    """Return whether several ranks would average whole gradients: their buckets follow what backward finishes."""
    config = job.config
    return isinstance(job.strategy, EveryStep) and config.comm.op == "average" and not config.optim.shard


class BucketOrder(Component):
    """Keeps the order, since the sums of more than two ranks depend on it: a run that goes on begins with it."""

    name = "bucket_order"

    def __init__(self, job: Job) -> None:
        self.wrap_options = {"follows_backward": True, "gradient_as_bucket_view": gradients_are_views(job)}
        self._optimizer: WrappedOptimizer | None = None

    @classmethod
    def of(cls, job: Job) -> BucketOrder | None:
        """Return one where several ranks average whole gradients."""
        return cls(job) if job.world.size > 1 and follows_backward(job) else None

    def attach(self, training: Training) -> None:
        """Learn of the optimizer."""
        self._optimizer = training.optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the names of parameters in that order, once there was a step."""
        order = self._optimizer.bucket_order if self._optimizer is not None else []
        return {"names": order} if order else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the buckets follow it from the first step on."""
        if self._optimizer is not None:
            self._optimizer.bucket_order = [str(name) for name in state["names"]]
