"""Linear layers whose matrix products are oneDNN's, on CPUs where MKL is slow.

torch computes fp32 products on x86 by MKL, which leaves AVX-512 unused on processors that are not Intel's: on an AMD
EPYC that has it, oneDNN, which torch brings along too, is twice as fast (benchmarks/results/linear.txt), or as fast
on a generation that takes it in two halves (benchmarks/results/linear_family25.txt). On one that
has AVX2 alone MKL is the faster one (benchmarks/results/linear_avx2.txt). Products in 16 bits are oneDNN's anyway.
"""

from __future__ import annotations

import functools
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdtrain.models.private_torch import is_transformed
from hvdtrain.process.processor import cpuinfo, words_of

Library = Literal["auto", "torch", "onednn"]
# Below so many multiplications, what surrounds the product costs more than it: in the steps of a small network, whose
# caches are cold, a layer of 6 million took longer by oneDNN (benchmarks/results/linear_small.txt).
_FEWEST_PRODUCTS = 16_000_000


def takes_onednn(library: Library, device: torch.device) -> bool:
    """Return whether linear layers on this device shall compute by oneDNN. `auto` goes by the kind of the CPU.

    It is not measured: ranks would decide one way or the other, and runs could not be repeated bit by bit.
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if library == "torch" or device.type != "cpu" or not has_onednn:
        return False
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return library == "onednn" or (has_mkl and is_slow_for_mkl(platform.machine(), cpuinfo()))


def is_slow_for_mkl(machine: str, description: str) -> bool:
    """Return whether a processor has AVX-512 and MKL does not use it, by what Linux tells of the processor."""
    makers, flags = words_of(description, "vendor_id"), words_of(description, "flags")
    return machine == "x86_64" and bool(makers) and "GenuineIntel" not in makers and "avx512f" in flags


def use_onednn(model: nn.Module) -> None:
    """Have the model's linear layers compute by oneDNN where that is faster, in place.

    They stay what they were, with a forward pass of their own; parameters and their names do not change.
    """
    mixins: dict[Any, type] = {nn.Linear: _OneDnn, **dict.fromkeys(_layers_of_gpt2(), _OneDnnTransposed)}
    for module in model.modules():
        for layer, mixin in mixins.items():
            if isinstance(module, layer) and type(module).forward is layer.forward:
                kind: Any = type(module)
                module.__class__ = _with_onednn(kind, mixin)


def _layers_of_gpt2() -> list[type]:
    """Return transformers' linear layer of GPT-2, whose weight is `(in, out)`, where transformers is in use."""
    loaded: Any = sys.modules.get("transformers.pytorch_utils")
    return [loaded.Conv1D] if hasattr(loaded, "Conv1D") else []


def product_of(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function, of `x` and `weight`, by which this layer computes `x @ weight.T`."""
    return linear if isinstance(layer, _OneDnn) else F.linear


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type in which products of what is like this tensor are computed: its own, or what autocast says."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` by oneDNN, or as torch does where oneDNN would not be faster.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)`.
    """
    if not _suits(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def products(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return what each of these linear layers makes of `x`.

    In training on GPUs, where the layers are torch's own without bias, by one product: a larger one keeps a GPU busier,
    `x` is cast and read once, and its gradient is summed inside the product. The weights stay parameters of their own;
    to put them together takes a pass over them, which a compiler makes part of the cast that autocast makes anyway.
    """
    first: Any = layers[0]
    if _gains_by_one(x) and all(_is_plain(layer) and _is_like(layer, first) for layer in layers):
        return _by_one_product(x, layers)
    return [layer(x) for layer in layers]


def _gains_by_one(x: Tensor) -> bool:
    """Return whether it pays to put weights together: not for the few tokens that are written at a time."""
    return x.is_cuda and (torch.compiler.is_compiling() or torch.is_grad_enabled())


def _is_plain(layer: nn.Module) -> bool:
    is_own = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and layer.bias is None
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return is_own and not any(hooks)


def _is_like(layer: Any, other: Any) -> bool:
    return bool(layer.weight.dtype == other.weight.dtype and layer.weight.device == other.weight.device)


def _by_one_product(x: Tensor, layers: Sequence[Any]) -> list[Tensor]:
    weights = [layer.weight for layer in layers]
    return list(torch.split(F.linear(x, torch.cat(weights)), [len(weight) for weight in weights], -1))


def _suits(x: Tensor, weight: Tensor) -> bool:
    if x.numel() * weight.shape[0] < _FEWEST_PRODUCTS:  # asked first: it answers for the layers that take no time
        return False
    if type(x) is not Tensor or x.ndim < 2 or not x.dtype == weight.dtype == torch.float32 or x.device.type != "cpu":
        return False
    is_traced = torch.compiler.is_compiling() or is_transformed()
    return not is_traced and not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    """y = x W' + b; dx = g W and dW = g' x are the same function of other arguments, so that they have gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _Linear.apply(gradient, weight.t(), None).view_as(x) if needs_x else None,  # type: ignore[no-untyped-call]
            _Linear.apply(gradient.t(), x.flatten(0, -2).t(), None) if needs_weight else None,  # type: ignore[no-untyped-call]
            gradient.sum(0) if needs_bias else None,
        )


class _OneDnn:
    """Mixed into the class of a linear layer whose weight is `(out, in)`."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        return linear(x, self.weight, self.bias)


class _OneDnnTransposed:
    """Mixed into the class of a linear layer whose weight is `(in, out)`."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        weight = self.weight.t()
        if not _suits(x, weight):
            y: Tensor = super().forward(x)  # type: ignore[misc]
            return y
        return linear(x, weight, self.bias)


@functools.cache
def _with_onednn(kind: type, mixin: type) -> type:
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
