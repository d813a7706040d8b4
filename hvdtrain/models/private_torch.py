"""Every use of what torch does not promise to keep, here, in `private_*.py` beside it, and for optimizers in `optim/`.

Seen in torch 2.13: who changes its version looks here first. Nothing else reaches into torch's private names.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "BatchNorm",
    "FakeTensorMode",
    "LiveBytes",
    "apply_to_tensors",
    "backward_run",
    "compile_in_place",
    "computed_node",
    "constant_when_compiled",
    "copy_all_",
    "divided_all",
    "function_modes",
    "functionalized_calls",
    "is_compiled_backward",
    "is_fake",
    "is_freshly_seeded",
    "is_transformed",
    "is_watched",
    "norm_of",
    "on_compilation",
    "outside_of_compilers",
    "queue_after_run",
    "run_backward",
    "without_modes",
    "zero_all_",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operators make while it is entered, as long as that lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator, and note new storages among what it returns."""
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._note(tensor.untyped_storage(), given)
        return result

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive or key in given:  # what is given and not noted was there before
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def is_watched() -> bool:
    """Return whether a mode sees every operator now, as one does that counts them or their memory.

    The compiler passes over a function that it meets under such a mode, and for good.
    """
    return bool(torch._C._len_torch_dispatch_stack())


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Within, no mode sees functions and operators, nor makes fake tensors of these."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def copy_all_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source to its target, of the same shape; on GPUs by few kernels for all of a type.

    Of several types at once torch would copy tensor by tensor.
    """
    kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for pair in zip(targets, sources, strict=True) if targets and not targets[0].is_cpu else ():
        kinds.setdefault((pair[0].device, pair[0].dtype, pair[1].dtype), []).append(pair)
    each: list[Any] = [zip(*pairs, strict=True) for pairs in kinds.values()] or [(targets, sources)]
    for own, others in each:
        torch._foreach_copy_(list(own), list(others))


def divided_all(tensors: list[Tensor], by: float) -> list[Tensor]:
    """Return all divided; on GPUs by few kernels."""
    return list(torch._foreach_div(tensors, by))


def zero_all_(tensors: list[Tensor]) -> None:
    """Set all to zero; on GPUs by few kernels."""
    torch._foreach_zero_(tensors)


def compile_in_place(module: nn.Module) -> None:
    """Do what `module.compile()` does, for torch's own classes as well.

    Of an `nn.Sequential` that compiles nothing: the compiler passes over what stands in torch's own files where it
    comes upon it first, and what it finds there is the method that all modules have.
    """
    if not type(module).__module__.startswith("torch.nn."):
        module.compile()
        return
    whole: Any = module

    def call(*args: Any, **kwargs: Any) -> Any:
        return type(whole)._call_impl(whole, *args, **kwargs)

    vars(module)["_call_impl"] = call
    try:
        module.compile()
    finally:
        del vars(module)["_call_impl"]


def constant_when_compiled(function: _Function) -> _Function:
    """Have torch.compile take what a function returns for a constant: `torch.compiler.assume_constant_result`.

    That one loads the compiler at once, which takes as long again as torch.
    """
    cast(Any, function)._dynamo_marked_constant = True
    return function


def outside_of_compilers(function: _Function) -> _Function:
    """Have torch.compile leave alone a function and all that it calls: `torch.compiler.disable`, which loads it."""
    left_alone: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch._C._dynamo.eval_frame.get_eval_frame_callback() is None:  # none looks at what runs here
            return function(*args, **kwargs)
        if not left_alone:
            left_alone.append(cast(Any, torch.compiler).disable(function))
        return left_alone[0](*args, **kwargs)

    return cast(_Function, call)


def on_compilation(begin: Callable[..., None], end: Callable[..., None]) -> None:
    """Have a compiling thread call these as torch.compile begins and ends; `torch._dynamo.reset()` forgets them."""
    from torch._dynamo.callback import callback_handler  # takes seconds to import

    for known, one in ((callback_handler.start_callbacks, begin), (callback_handler.end_callbacks, end)):
        if one not in known:  # each is called once, however often it is given
            known.append(one)


def apply_to_tensors(model: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Put `function` of each parameter and buffer in its place, as `model.to` does; parameters stay the objects."""
    whole: Any = model
    whole._apply(function)
    return model


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no storage, so that nothing may depend on its values."""
    return isinstance(tensor, FakeTensor)


def is_freshly_seeded(generator: torch.Generator, seed: int) -> bool:
    """Return whether nothing was drawn from a generator since it was given this seed.

    Its state begins with the seed and with how far it is: whatever draws moves that.
    """
    head = struct.pack("<QiiQ", seed, 1, 1, 0) if generator.device.type == "cpu" else struct.pack("<QQ", seed, 0)
    state = generator.get_state()  # in host memory
    return ctypes.string_at(state.data_ptr(), len(head)) == head


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all numbers of dense tensors, a scalar: bitwise torch's `get_total_norm`.

    Plain tensors of one type in host memory need not be sorted by these first, which takes as long as the norms.
    """
    dtype = tensors[0].dtype if tensors else None
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype != dtype or tensor.requires_grad:
            return torch.nn.utils.get_total_norm(tensors)
    if dtype is None:
        return torch.tensor(0.0)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), 2.0)), 2.0)
    return norm


def function_modes() -> list[Any]:
    """Return the torch function modes that are entered, the last one last."""
    from torch.overrides import _get_current_function_mode_stack

    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def functionalized_calls() -> list[Any]:
    """Return the operators by which some compilers call one that changes its arguments."""
    found = (getattr(torch.ops.higher_order, name, None) for name in ("auto_functionalized", "auto_functionalized_v2"))
    return [call for call in found if call is not None]


def run_backward(
    tensor: Tensor,
    gradient: Tensor,
    retain_graph: bool = False,
    create_graph: bool = False,
    inputs: Sequence[Tensor] = (),
) -> None:
    """Run the backward pass as `torch.autograd.backward` does, with the torch function modes that are active.

    The gradient is of the tensor's type and shape: nobody looks.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (tensor,), (gradient,), retain_graph, create_graph, tuple(inputs), allow_unreachable=True, accumulate_grad=True
    )


def is_transformed() -> bool:
    """Tell whether `torch.func` (grad, vmap, ...) is at work: functions without rules for it must stay out."""
    return bool(torch._C._are_functorch_transforms_active())


def backward_run() -> int:
    """Return the number of autograd's run that this thread is in; -1 outside of any."""
    return int(torch._C._current_graph_task_id())


def is_compiled_backward() -> bool:
    """Return whether the run is one of compiled autograd, which forgets what it is to call at its end."""
    compiler = sys.modules.get("torch._dynamo.compiled_autograd")
    return compiler is not None and bool(compiler.in_compiled_autograd_region)


def queue_after_run(action: Callable[[], None]) -> None:
    """Have autograd call `action` at the end of the run that this thread is in, as DistributedDataParallel does."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(action)


def computed_node() -> Any:
    """Return the node of autograd's graph that this thread is computing, or None."""
    return torch._C._current_autograd_node()
