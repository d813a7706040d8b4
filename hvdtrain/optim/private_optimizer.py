"""What hvdtrain uses of torch's optimizers that torch does not promise to keep: each seen in torch 2.13."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _global_optimizer_post_hooks as _AFTER_EACH
from torch.optim.optimizer import _global_optimizer_pre_hooks as _BEFORE_EACH
from torch.optim.optimizer import _use_grad_for_differentiable


def postpone_compiler() -> None:
    """Have optimizers work without torch's compiler until something compiles.

    torch keeps what it compiles away from these functions, and loads its compiler at their first call to do so: as
    long again as torch itself takes, and sympy with it, in each rank, also where nothing is ever compiled.
    """
    for function in list(vars(torch.optim.Optimizer).values()):
        if getattr(function, "__code__", None) is _KEPT_AWAY.__code__:
            _call_directly(function)
    for kind in [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]:
        _step_directly(kind)


def _step_directly(kind: Any) -> None:
    """Have a class of torch's step without torch's compiler, on whose behalf it loads that, until something compiles.

    Also as a part of another optimizer, or where it is only tried: such steps are called by their own name.
    """
    step: Any = vars(kind).get("step")
    if getattr(step, "__code__", None) is not _GRAD_SWITCHED.__code__:  # or one was made before, which has loaded it
        return
    direct = _switching_grad(step.__wrapped__)

    @functools.wraps(step.__wrapped__)
    def late(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        return (step if "torch._dynamo" in sys.modules else direct)(optimizer, *args, **kwargs)

    kind.step = late


def _nothing() -> None:
    """Be what torch puts its wrappers around: the code of each is the same for all functions."""


_KEPT_AWAY: Any = _disable_dynamo(_nothing)
_GRAD_SWITCHED: Any = _use_grad_for_differentiable(_nothing)
_SCALES = "_step_supports_amp_scaling"
PASSED_ON = {_SCALES}
"""What an optimizer has of its own goes on to count when it becomes one that is `SeenByScalers`."""
_DIRECT = "__dynamo_disable"
"""Where such a function keeps what it calls from its second call on."""


def _call_directly(function: Any) -> None:
    inner = function.__wrapped__

    @functools.wraps(inner)
    def direct(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return inner(*args, **kwargs)
        if getattr(inner, _DIRECT, None) is direct:  # something compiles: from here on as torch does it
            delattr(inner, _DIRECT)
        return function(*args, **kwargs)

    direct._torchdynamo_disable = True  # type: ignore[attr-defined]  # what is compiled stops here, as it did
    if "torch._dynamo" not in sys.modules and not hasattr(inner, _DIRECT):
        setattr(inner, _DIRECT, direct)


def can_skip_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the optimizer takes a step or not as a tensor on its device says: fused ones do.

    The attribute is the one by which `torch.amp.GradScaler` knows them.
    """
    of_class = any(vars(kind).get(_SCALES) is True for kind in type(optimizer).__mro__)
    return bool(vars(optimizer).get(_SCALES, of_class))


class SeenByScalers(torch.optim.Optimizer):
    """An optimizer that knows when a `torch.amp.GradScaler` is about to step it: that asks it one thing beforehand."""

    def before_scaler(self) -> None:
        """Raise where a loss scaler must not step this optimizer."""

    @property
    def _step_supports_amp_scaling(self) -> bool:
        self.before_scaler()
        return can_skip_by_itself(self)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__[_SCALES] = value


@contextlib.contextmanager
def skipping_where(optimizer: Any, is_skipped: Tensor, divisor: Tensor | None = None) -> Iterator[None]:
    """Within, such an optimizer's `step` leaves everything as it is where `is_skipped`, bool, a scalar, is True.

    Where it is not, it divides the gradients by `divisor` first, a scalar, and they stay so: as a loss scaler has it.
    """
    optimizer.found_inf = is_skipped.float()
    if divisor is not None:
        optimizer.grad_scale = divisor
    try:
        yield
    finally:
        del optimizer.found_inf
        if divisor is not None:
            del optimizer.grad_scale


def is_looked_at(optimizer: Any) -> bool:
    """Return whether hooks that are not hvdtrain's run before each step: they shall see what the step will take."""
    hooks = (*_BEFORE_EACH.values(), *optimizer._optimizer_step_pre_hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("hvdtrain.") for hook in hooks)


def tell_scaler(scaler: Any, optimizer: torch.optim.Optimizer, is_infinite: Tensor) -> None:
    """Have the next `update` of a `torch.amp.GradScaler` go by this, bool, a scalar, instead of what it has looked at.

    It looks at the gradients of the optimizer that it is given: where ranks have a part each, each would move its own
    factor, and one whose part is empty has nothing to go by.
    """
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    found.clear()
    found[is_infinite.device] = is_infinite.float()


def hook_before_step(optimizer: torch.optim.Optimizer, hook: Callable[..., Any]) -> None:
    """Register a hook before `step` that runs before all that are registered already."""
    handle = optimizer.register_step_pre_hook(hook)
    hooks: Any = optimizer._optimizer_step_pre_hooks
    hooks.move_to_end(handle.id, last=False)


def hooked_step(function: Callable[..., Any]) -> Any:
    """Return a function as a class's `step`, which calls an optimizer's hooks before and behind it."""
    step: Any = torch.optim.Optimizer.profile_hook_step(function)
    step.hooked = True  # torch looks whether it has done so
    return step


@contextlib.contextmanager
def without_step_hooks(optimizer: Any) -> Iterator[None]:
    """Within, an optimizer's `step` calls none of its own hooks."""
    before = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = before


def without_record(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return an optimizer class's `step` that does the same, and tells profilers of it only where one is at work.

    The entry takes a small network as long as its norm; nor is torch's compiler loaded to be told of what it does not
    see. One that torch has not put its hooks on is returned as it is.
    """
    bare = getattr(step, "__wrapped__", None)
    if bare is None or not getattr(step, "hooked", False):
        return step
    if getattr(bare, "__code__", None) is _GRAD_SWITCHED.__code__:
        bare = _switching_grad(bare.__wrapped__)

    @functools.wraps(step)
    def leaner(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if torch._C._autograd._profiler_enabled() or torch.compiler.is_compiling():
            return step(optimizer, *args, **kwargs)
        given = ((optimizer, *args), kwargs)
        for hook in (*_BEFORE_EACH.values(), *optimizer._optimizer_step_pre_hooks.values()):
            given = hook(optimizer, *given) or given
        result = bare(*given[0], **given[1])
        for hook in (*optimizer._optimizer_step_post_hooks.values(), *_AFTER_EACH.values()):
            hook(optimizer, *given)
        return result

    return leaner


def _switching_grad(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `step` under which gradients are recorded only where the optimizer is to be differentiated through."""

    def switched(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            return step(optimizer, *args, **kwargs)

    return switched


def add_all_(tensors: list[Any], others: list[Any], alpha: float) -> None:
    """Add `alpha` times the others, one to each; bitwise `tensor.add_(other, alpha=alpha)`."""
    torch._foreach_add_(tensors, others, alpha=alpha)


def fused_sgd_(
    weights: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor],
    group: dict[str, Any],
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Take a step of SGD, in place, with the settings of a parameter group of torch's.

    Args:
        weights: real, of one type and device.
        gradients: each lies in memory as its weight does.
        momenta: the same; none where there is no momentum.
        group: of the optimizer.
        scale: what gradients are to be divided by, a scalar, if anything.
        found_inf: a scalar that is not 0 where nothing is to change, if one knows.
    """
    names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    settings = {name: group[name] for name in names}
    settings |= {"is_first_step": False, "grad_scale": scale, "found_inf": found_inf}
    if weights[0].is_cpu and weights[0].element_size() < 4:
        _each_in_fp32(weights, gradients, momenta, settings)
        return
    torch._fused_sgd_(weights, gradients, momenta, **settings)


def _each_in_fp32(
    weights: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], settings: dict[str, Any]
) -> None:
    """Do what the kernel should do with 16 bits: compute in fp32, and round what is kept.

    On CPUs it leaves out the numbers behind the last whole vector, and writes into their momentum what lay in memory.
    """
    for number, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        own = [weight, gradient, *momenta[number : number + 1]]
        wide = [tensor.float() for tensor in own]
        torch._fused_sgd_([wide[0]], [wide[1]], wide[2:], **settings)
        for tensor, moved in zip(own, wide, strict=True):
            tensor.copy_(moved)
