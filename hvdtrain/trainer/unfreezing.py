"""`GradualUnfreezing`: layers begin to learn one after another, the last ones first (arXiv:1801.06146, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping

from hvdtrain.errors import ConfigError
from hvdtrain.trainer.callback import Callback, RunView


class GradualUnfreezing(Callback):
    """A callback that keeps parameters frozen until a step.

    A frozen parameter has no gradient, so neither the update nor weight decay moves it. Which ones learn is a function
    of the step alone: a run that goes on needs no more.

    Args:
        steps: for each beginning of a parameter's name, the completed steps after which it learns. Of several
            beginnings that fit, the longest counts; parameters that none fits learn from the start, if they are
            trainable at all.

    Example: the head at once, the last block after 100 steps, the rest after 300.

        Task(..., callbacks=[GradualUnfreezing({"": 300, "blocks.3": 100, "head": 0})])
    """

    def __init__(self, steps: Mapping[str, int]) -> None:
        self.steps = dict(steps)
        self._names: dict[str, int] = {}

    def begin(self, run: RunView) -> None:
        """Freeze what is to learn later than this start.

        Raises:
            ConfigError: a beginning that no trainable parameter has, or a step that is no whole number.
        """
        names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
        for start, step in self.steps.items():
            if isinstance(step, bool) or not isinstance(step, int) or step < 0:
                raise ConfigError(f"GradualUnfreezing: {start!r}: {step!r} must be a number of steps, 0 or more")
            if not any(_begins(name, start) for name in names):
                known = ", ".join(names[:8])
                raise ConfigError(
                    f"GradualUnfreezing: no trainable parameter begins with {start!r}; there are {known}, ..."
                )
        for name in names:
            fitting = [start for start in self.steps if _begins(name, start)]
            if fitting:
                self._names[name] = self.steps[max(fitting, key=len)]
        self.after_step(run)

    def after_step(self, run: RunView) -> None:
        """Have learn what is due for the next step."""
        for name, parameter in run.model.named_parameters():
            if name in self._names and parameter.requires_grad != (is_due := run.step >= self._names[name]):
                parameter.requires_grad_(is_due)
                if not is_due:
                    parameter.grad = None


def _begins(name: str, start: str) -> bool:
    """Tell whether a dotted name begins with a dotted one: `blocks.1` is no beginning of `blocks.10.weight`."""
    return not start or name == start or name.startswith(f"{start}.")
