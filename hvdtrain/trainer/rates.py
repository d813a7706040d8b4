"""The learning rate of each group of parameters: the schedule's, times what the optimizer was built with."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING

import torch

from hvdtrain.errors import ConfigError

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job


class GroupRates:
    """Sets the rates of an optimizer's groups before every step.

    A group that was built with a rate of its own keeps its ratio to `--optim.peak-lr`, as a backbone that shall learn
    slower than its head. So does a group that is added later.

    Args:
        job: what is trained.
        optimizer: as the task has built it.

    Raises:
        ConfigError: it was built with a rate that nothing would ever use.
    """

    def __init__(self, job: Job, optimizer: torch.optim.Optimizer) -> None:
        self._log, self._peak = job.log, job.config.optim.peak_lr
        self._factors = _factors(optimizer, self._peak)
        self._last: list[float] = []
        """What the groups were given before the last step; nothing before the first of a start."""
        self._has_warned = False
        self.rate = math.nan
        """That of a group without a ratio of its own, in the last step."""

    @property
    def about(self) -> str:
        """Return a line for the person who starts the run, if there is something to know."""
        if set(self._factors) == {1.0}:
            return ""
        listed = ", ".join(f"{factor:g}" for factor in self._factors[:6])
        more = ", ..." * (len(self._factors) > 6)
        return f"rates:      the optimizer's groups learn at {listed}{more} times the learning rate, as they were built"

    def set(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Give each group the rate of this step: `rate` times its own ratio."""
        groups = optimizer.param_groups
        for group in groups[len(self._factors) :]:
            self._factors.append(float(group["lr"]) / self._peak)
        for place, (group, last) in enumerate(zip(groups, self._last, strict=False)):
            if group["lr"] != last and not self._has_warned:
                self._has_warned = True
                self._log.say(
                    f"WARNING: the learning rate of group {place} was changed from {last:g} to {float(group['lr']):g}"
                    " after a step, which has no effect: it is set before every step, as --optim.schedule says"
                )
        self.rate = rate
        self._last = [rate * factor for factor in self._factors]
        for group, own in zip(groups, self._last, strict=False):
            group["lr"] = own


def _factors(optimizer: torch.optim.Optimizer, peak: float) -> list[float]:
    """Return the ratio of each group's rate to the peak."""
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    if len(rates) < len(optimizer.param_groups):
        return [1.0] * len(optimizer.param_groups)
    has_peak = any(math.isclose(rate, peak) for rate in rates)
    if len(set(rates)) == 1 and (has_peak or rates[0] == _rate_of_class(type(optimizer))):
        return [1.0] * len(rates)
    if not has_peak:
        several = f"rates of {', '.join(f'{rate:g}' for rate in rates[:3])}" if len(set(rates)) > 1 else ""
        raise ConfigError(
            f"build_optimizer returned an optimizer with {several or f'a learning rate of {rates[0]:g}'}, and"
            f" --optim.peak-lr is {peak:g}: the rate is set before every step. Write lr=optim.peak_lr, and for groups"
            " that learn slower a share of it, 0.1 * optim.peak_lr"
        )
    return [rate / peak for rate in rates]


def _rate_of_class(kind: type[torch.optim.Optimizer]) -> object:
    """Return the rate that a class takes where none is given."""
    parameter = inspect.signature(kind).parameters.get("lr")
    return None if parameter is None else parameter.default
