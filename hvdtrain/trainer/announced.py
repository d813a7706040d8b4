"""What the parts of a training say before its first step, and what they would say, and refuse, if it were begun."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hvdtrain.errors import HvdtrainError
from hvdtrain.models.private_torch import FakeTensorMode
from hvdtrain.models.weights import check_types
from hvdtrain.trainer.component import Component
from hvdtrain.trainer.components import build_components
from hvdtrain.trainer.fakes import fake_model
from hvdtrain.trainer.model import check_settings_of
from hvdtrain.trainer.rates import GroupRates
from hvdtrain.trainer.state import wrapped_optimizer

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job


def announced(rates: GroupRates | None, components: Sequence[Component]) -> Iterator[str]:
    """Yield the lines for the person who starts a run; `rates`: None where nobody can tell."""
    if rates is not None and rates.about:
        yield rates.about
    yield from (component.about for component in components if component.about)


def would_announce(job: Job) -> list[str]:
    """Return these lines of a run that is not begun: on a model without storage, whose optimizer is wrapped.

    Raises:
        ConfigError: a run would be refused: the model, the optimizer or the ranks cannot do what the settings ask.
    """
    check_settings_of(job.task.model, job.config, job.world)
    check_types(job.task.model)
    model = fake_model(job, FakeTensorMode(allow_non_fake_inputs=True))
    components = build_components(job)
    try:
        _, rates = wrapped_optimizer(job, model, components)
    except HvdtrainError:
        raise
    except Exception:  # of any type: a user's own optimizer may look at the numbers of its weights
        rates = None
    return [*announced(rates, components)]
