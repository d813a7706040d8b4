"""How often something happens: every so many steps, epochs or seconds, as people write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.settings.units import parse_duration, shortened

Every = int | str
"""Steps as a number, or a text that `parse_every` takes."""


@dataclass(frozen=True)
class Interval:
    """A distance between two events."""

    number: float
    """Of steps, passes over the training data, or seconds; above 0."""
    unit: Literal["steps", "epochs", "seconds"]

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Tell whether the event comes right after `step` completed steps; never where it goes by seconds.

        A share of an epoch that is no whole number of steps comes with the step that completes it.
        """
        return step > 0 and self.times(step, steps_per_epoch) > self.times(step - 1, steps_per_epoch)

    def times(self, step: int, steps_per_epoch: int) -> int:
        """Return how often the event has come by the end of `step` completed steps; 0 where it goes by seconds."""
        if self.unit == "seconds":
            return 0
        if self.unit == "steps":
            return int(step // self.number)
        return int(step / (self.number * steps_per_epoch) + 1e-9)  # 0.1 epochs of 30 steps are 3, not a little more


def parse_every(name: str, value: Every, seconds: bool = False) -> Interval:
    """Return the interval of `100`, `1epoch`, `0.5 epochs` or, where that is allowed, `10s` and `5m`.

    Args:
        name: the setting, for the message.
        value: what was given.
        seconds: whether time may be given, too.

    Raises:
        ConfigError: it is none of these, or not above 0.
    """
    if isinstance(value, int):
        return Interval(value, "steps")
    text = value.strip().lower()
    steps = re.fullmatch(r"([0-9]{1,12}) *(?:steps?)?", text)
    epochs = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})? *epochs?", text)
    interval: Interval | None = None
    if steps:
        interval = Interval(int(steps[1]), "steps")
    elif epochs:
        interval = Interval(float(epochs[1] or 1), "epochs")
    elif seconds and re.fullmatch(r"(?:[0-9]{1,9}[dhms])+", text):
        interval = Interval(parse_duration(text), "seconds")
    if interval is None or interval.number <= 0:
        also = ", 30s" if seconds else ""
        raise ConfigError(f"{name} = '{shortened(value)}' must be steps or epochs above 0, such as 100, 1epoch{also}")
    return interval
