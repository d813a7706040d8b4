"""What every sink can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from hvdtrain.errors import ConfigError

Metrics = Mapping[str, float]
"""By name, `group/name` with its unit: `train/loss`, `time/step_s`, `throughput/tokens_per_s`."""
Samples = Mapping[str, Any]
"""By name: a text, or an image, uint8 `(height, width, 3)` or `(height, width)`, as a numpy array or a tensor."""

_METHODS = ("begin", "write", "close")


class Sink(Protocol):
    """A place that metrics go to.

    One that also has a method `show(step, samples)` is given what the model makes of held-out data after each
    evaluation: `Samples`, as `Task.samples` returns them.
    """

    def begin(self, step: int, num_steps: int) -> None:
        """Get ready for the steps after `step`, up to `num_steps`. Called once, when nothing is refused any more."""
        ...

    def write(self, step: int, metrics: Metrics, event: str | None) -> None:
        """Take the metrics of a step (in optimizer steps completed) and perhaps what happened then."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


def takes_samples(sink: Sink) -> bool:
    """Return whether a sink shows what the model makes of held-out data, too."""
    return callable(getattr(sink, "show", None))


def check_sinks(sinks: object) -> None:
    """Raise ConfigError where what a recipe calls its sinks is something else."""
    if not isinstance(sinks, tuple | list):
        raise ConfigError(f"Task.sinks is {type(sinks).__name__}: give a list of objects, sinks=[MySink()]")
    for sink in sinks:
        if isinstance(sink, type):
            raise ConfigError(f"Task.sinks holds the class {sink.__name__}: make an object, {sink.__name__}()")
        missing = [method for method in _METHODS if not callable(getattr(sink, method, None))]
        if missing:
            raise ConfigError(f"Task.sinks holds {type(sink).__name__}, which has no method {missing[0]}")
