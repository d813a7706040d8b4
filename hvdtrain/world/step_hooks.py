"""What happens around a wrapped optimizer's `step`: averaging before it, cleaning up behind it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from hvdtrain.models.private_torch import outside_of_compilers
from hvdtrain.optim.private_optimizer import hook_before_step
from hvdtrain.world.closure import over_ranks
from hvdtrain.world.exchange import GradientExchange

if TYPE_CHECKING:
    from hvdtrain.world.world import World
    from hvdtrain.world.wrapped import WrappedOptimizer

_log = logging.getLogger("hvdtrain")


def hang_on_step(
    world: World, wrapped: WrappedOptimizer, exchange: GradientExchange, model: nn.Module, prefix: str
) -> None:
    """Have `step` average first, whoever calls it."""
    left_out = [model]  # looked at once, in the first step

    def before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if callable(closure):  # a class of a user's own may take something else there
            of_all = over_ranks(world, exchange, closure, f"{prefix}.loss")
            return ((args[0], of_all, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": of_all})
        if optimizer._should_synchronize:
            exchange.finish()
        else:
            exchange.check_finished()
        _say_what_is_left_out(world, left_out)
        return None

    hook_before_step(wrapped, outside_of_compilers(before_step))  # the user's own hooks shall see the mean
    # Fused optimizers skip a step by `found_inf`, which torch's loss scaler sets while they step.
    after_step: Any = outside_of_compilers(lambda stepped, *_: exchange.end_step(getattr(stepped, "found_inf", None)))
    wrapped.register_step_post_hook(after_step)


def _say_what_is_left_out(world: World, models: list[nn.Module]) -> None:
    """Warn of gradients that no optimizer averages: harmless, until a norm over the whole model clips by them.

    Takes the models out of the list, so that each is looked at once.
    """
    names = world.not_averaged(models.pop()) if models and not world.rank else []
    if names:
        _log.warning(
            "the gradient of %s stays each rank's own, as no wrapped optimizer has this parameter: a norm over the"
            " whole model, as in clip_grad_norm_, differs on every rank then, and so do the weights. Clip what the"
            " optimizer has, or freeze the rest with requires_grad_(False)",
            f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}",
        )
