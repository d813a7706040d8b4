"""Functions that draw random numbers, for the samples of a micro-batch: what `SampleRandomness` answers, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hvdtrain.trainer.randomness import SampleRandomness


def _bernoulli(self: SampleRandomness, input: Tensor, p: float | None = None) -> Any:
    u = self.uniform(input.shape, input.device)
    return NotImplemented if u is None else (u < (input if p is None else p)).to(input.dtype)


def _bernoulli_(self: SampleRandomness, input: Tensor, p: Tensor | float = 0.5) -> Any:
    u = self.uniform(input.shape, input.device)
    return NotImplemented if u is None else input.copy_(u < p)


def _uniform_(self: SampleRandomness, input: Tensor, *bounds: float, **named: float) -> Any:
    """Answer `uniform_(a, b)`; by name these are `from` and `to`."""
    a, b = _bounds(bounds, named, 0.0, 1.0)
    u = self.uniform(input.shape, input.device)
    return NotImplemented if u is None else input.copy_(a + (b - a) * u)


def _normal_(self: SampleRandomness, input: Tensor, mean: float = 0.0, std: float = 1.0) -> Any:
    drawn = _drawn(self, _as_normal, input.shape, input.device, input.dtype)
    return NotImplemented if drawn is NotImplemented else input.copy_(mean + std * drawn)


def _rand_like(self: SampleRandomness, input: Tensor, **kwargs: Any) -> Any:
    return _like(self, _as_it_is, input, **kwargs)


def _randn_like(self: SampleRandomness, input: Tensor, **kwargs: Any) -> Any:
    return _like(self, _as_normal, input, **kwargs)


def _like(self: SampleRandomness, make: Callable[[Tensor], Tensor], input: Tensor, **kwargs: Any) -> Any:
    if not _plain_factory(kwargs):
        return NotImplemented
    device, dtype = torch.device(kwargs.get("device") or input.device), kwargs.get("dtype") or input.dtype
    return _drawn(self, make, input.shape, device, dtype)


def _rand(self: SampleRandomness, *size: Any, **kwargs: Any) -> Any:
    return _factory(self, _as_it_is, size, kwargs)


def _randn(self: SampleRandomness, *size: Any, **kwargs: Any) -> Any:
    return _factory(self, _as_normal, size, kwargs)


def _factory(
    self: SampleRandomness, make: Callable[[Tensor], Tensor], size: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if "size" in kwargs and not size:
        size = (kwargs.pop("size"),)
    if not _plain_factory(kwargs):
        return NotImplemented
    shape = tuple(size[0]) if len(size) == 1 and isinstance(size[0], Sequence) else size
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    return _drawn(self, make, shape, device, kwargs.get("dtype") or torch.get_default_dtype())


def _drawn(
    self: SampleRandomness,
    make: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """Return numbers of a type made of uniform ones; complex ones of two parts."""
    if dtype.is_complex:
        parts = _drawn(self, make, (*shape, 2), device, dtype.to_real()) if shape else NotImplemented
        if parts is NotImplemented:
            return parts
        whole = torch.view_as_complex(parts)
        return whole * 0.5**0.5 if make is _as_normal else whole  # a variance of 1 for both together
    if not dtype.is_floating_point:  # for torch to refuse
        return NotImplemented
    # A single number, such as what drops a layer (arXiv:1909.11556), is drawn once for all samples of a step.
    u = self.uniform(shape, device) if shape else self.of_step(device)
    return NotImplemented if u is None else make(u).to(dtype)


def _as_it_is(u: Tensor) -> Tensor:
    return u


def _as_normal(u: Tensor) -> Tensor:
    """Turn uniform numbers into normal ones by the inverse of the distribution function."""
    normal: Tensor = torch.special.ndtri(u.double() + 2.0**-25).float()
    return normal


def _bounds(bounds: Sequence[Any], named: dict[str, Any], low: Any, high: Any) -> tuple[Any, Any]:
    """Return the two bounds, given by place or as `from` and `to`."""
    first, second = [*bounds, *(low, high)[len(bounds) :]]
    return named.get("from", first), named.get("to", second)


def _plain_factory(kwargs: dict[str, Any]) -> bool:
    return not kwargs.keys() - {"dtype", "device"}


def _whole(
    self: SampleRandomness, low: int, high: int, shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Any:
    """Return whole numbers from `low` to `high - 1`."""
    if not 0 < high - low < 2**53:
        return NotImplemented
    u = self.fine(shape, device)
    return NotImplemented if u is None else ((u * (high - low)).long() + low).to(dtype)


def _randint(self: SampleRandomness, *args: Any, **kwargs: Any) -> Any:
    """Answer `randint(high, size)` and `randint(low, high, size)`."""
    size, low, high = kwargs.pop("size", None), kwargs.pop("low", 0), kwargs.pop("high", None)
    bounds = list(args)
    if size is None and bounds and not isinstance(bounds[-1], int):
        size = bounds.pop()
    high = bounds.pop() if bounds else high
    low = bounds.pop() if bounds else low
    if size is None or bounds or not _plain_factory(kwargs):
        return NotImplemented
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    return _whole(self, int(low), int(high), tuple(size), device, kwargs.get("dtype") or torch.int64)


def _randint_like(self: SampleRandomness, input: Tensor, *bounds: Any, **kwargs: Any) -> Any:
    """Answer `randint_like(input, high)` and `randint_like(input, low, high)`."""
    low, high = (kwargs.pop("low", 0), kwargs.pop("high", None)) if not bounds else (0, bounds[0])
    if len(bounds) == 2:
        low, high = bounds
    elif len(bounds) == 1 and "high" in kwargs:
        low, high = bounds[0], kwargs.pop("high")
    if not _plain_factory(kwargs):
        return NotImplemented
    device = torch.device(kwargs.get("device") or input.device)
    return _whole(self, int(low), int(high), input.shape, device, kwargs.get("dtype") or input.dtype)


def _random_(self: SampleRandomness, input: Tensor, *bounds: int, **named: int) -> Any:
    if not bounds and "to" not in named:
        return NotImplemented
    low, high = _bounds(bounds, named, 0, None) if len(bounds) != 1 or named else (0, bounds[0])
    if high is None:
        return NotImplemented
    drawn = _whole(self, low, high, input.shape, input.device, input.dtype)
    return NotImplemented if drawn is NotImplemented else input.copy_(drawn)


def _normal(self: SampleRandomness, mean: Any = 0.0, std: Any = 1.0, size: Any = None, **kwargs: Any) -> Any:
    """Answer `normal` with tensors, or with numbers and a size."""
    tensors = [value for value in (mean, std) if isinstance(value, Tensor)]
    if not tensors:
        return NotImplemented if size is None else _factory(self, lambda u: mean + std * _as_normal(u), (size,), kwargs)
    if size is not None or kwargs:
        return NotImplemented
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))  # type: ignore[no-untyped-call]
    u = self.uniform(shape, tensors[0].device)
    return NotImplemented if u is None else mean + std * _as_normal(u).to(tensors[0].dtype)


def _in_place(transform: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return the answer of a method that fills a tensor, from a function of fine uniform numbers in (0, 1)."""

    def fill(self: SampleRandomness, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        u = self.fine(input.shape, input.device)
        return NotImplemented if u is None else input.copy_(transform(u + 2.0**-54, *args, **kwargs))

    return fill


def _exponential(u: Tensor, lambd: float = 1.0) -> Tensor:
    return -torch.log(u) / lambd


def _cauchy(u: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    return median + sigma * torch.tan(math.pi * (u - 0.5))


def _log_normal(u: Tensor, mean: float = 1.0, std: float = 2.0) -> Tensor:
    normal: Tensor = torch.special.ndtri(u)
    return torch.exp(mean + std * normal)


def _geometric(u: Tensor, p: float) -> Tensor:
    return torch.ceil(torch.log(u) / math.log1p(-p)).clamp_min(1)


def _multinomial(self: SampleRandomness, input: Tensor, num_samples: int, replacement: bool = False) -> Any:
    """Draw from the rows of `(n, K)`: by the distribution function, or as a race of exponential clocks."""
    if input.dim() != 2:
        return NotImplemented
    weights = input.double()
    if replacement or num_samples == 1:
        u = self.fine((len(input), num_samples), input.device)
        if u is None:
            return NotImplemented
        distribution = weights.cumsum(1)
        drawn = torch.searchsorted(distribution, u * distribution[:, -1:], right=True)
        last = (weights > 0).long().cumsum(1).argmax(1, keepdim=True)  # rounding may lead beyond it
        return torch.minimum(drawn, last)
    u = self.fine(input.shape, input.device)
    return NotImplemented if u is None else (weights / -torch.log(u + 2.0**-54)).topk(num_samples, 1).indices


# Arguments that change nothing at these values, which people write all the same.
_IDLE: dict[str, tuple[Any, ...]] = {
    "generator": (None,),
    "out": (None,),
    "layout": (None, torch.strided),
    "pin_memory": (None, False),
    "memory_format": (None, torch.preserve_format),
    "names": (None,),
}


def _heard(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return an answer that passes on what asks for a generator, a place for the result, or anything else unknown."""

    def heard(self: SampleRandomness, *args: Any, **kwargs: Any) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if not any(v is idle for idle in _IDLE.get(k, ()))}
        if kwargs.keys() & _IDLE.keys():
            return NotImplemented
        requires_grad = kwargs.pop("requires_grad", False)
        result = answer(self, *args, **kwargs)
        return result.requires_grad_() if requires_grad and isinstance(result, Tensor) else result

    return heard


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.Tensor.bernoulli_: _bernoulli_,
    torch.Tensor.uniform_: _uniform_,
    torch.Tensor.normal_: _normal_,
    torch.Tensor.random_: _random_,
    torch.Tensor.exponential_: _in_place(_exponential),
    torch.Tensor.cauchy_: _in_place(_cauchy),
    torch.Tensor.log_normal_: _in_place(_log_normal),
    torch.Tensor.geometric_: _in_place(_geometric),
    torch.multinomial: _multinomial,
    torch.Tensor.multinomial: _multinomial,
    torch.normal: _normal,
    torch.rand_like: _rand_like,
    torch.randn_like: _randn_like,
    torch.randint_like: _randint_like,
    torch.rand: _rand,
    torch.randn: _randn,
    torch.randint: _randint,
}

FUNCTIONS = {function: _heard(answer) for function, answer in _FUNCTIONS.items()}
