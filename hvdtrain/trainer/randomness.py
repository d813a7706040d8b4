"""Random numbers that belong to samples, not to ranks: dropout is the same on any number of ranks.

torch draws a batch's random numbers one after the other, so the ones that a sample gets depend on what else is in its
micro-batch. While `SampleRandomness` is entered they are instead a function of (seed, step, how many draws the step
made before, position of the sample in the global batch, place in the sample's own tensor). That holds for functions
whose tensor has the samples of the micro-batch as its first dimension:

- `dropout` in all its forms, also inside `scaled_dot_product_attention` and `nn.MultiheadAttention`;
- `rand`, `randn`, `rand_like`, `randn_like`, `bernoulli`, `Tensor.bernoulli_`, `.uniform_`, `.normal_`.

Anything else is drawn from torch's generator, which starts alike on every rank in every micro-batch: right for what is
shared by all samples. The dropout inside `nn.LSTM` and `nn.GRU` is out of reach.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hvdtrain.models.private_torch import run_backward

T = TypeVar("T")


class SampleRandomness(TorchFunctionMode):
    """Draws random numbers for the samples of one micro-batch; enter it around reading, forward and backward.

    torch's generator must be in the same state on every rank.

    Args:
        positions: int64 `(n,)`, where the micro-batch's samples stand in the global batch.
    """

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self._positions = positions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer the functions named above; pass all others on."""
        own = _OWN.get(func)
        if own is not None:
            answer = own(self, *args, **(kwargs or {}))
            if answer is not NotImplemented:  # a tensor whose first dimension is not the samples
                return answer
        return func(*args, **(kwargs or {}))

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Return fp32 numbers in [0, 1) of this shape, in steps of 2^-24; None if its first dimension is not `n`."""
        if not shape or shape[0] != len(self._positions) or 0 in shape:
            return None
        # From torch's generator, which activation checkpointing puts back before it computes something again.
        salt = int(torch.randint(2**62, (), device="cpu"))
        keys = _mix64(self._positions.to(device, non_blocking=True) * _GOLDEN + salt)
        per_sample = math.prod(shape[1:])
        x = torch.arange(per_sample, dtype=torch.int32, device=device) ^ keys.to(torch.int32)[:, None]
        x = _mix32(_mix32(x) + (keys >> 32).to(torch.int32)[:, None])
        return (((x >> 8) & 0xFFFFFF).float() * 2.0**-24).view(shape)


class MicroBatchRandomness:
    """Puts `SampleRandomness` around micro-batches, if they draw any random numbers: it slows small models down.

    The first micro-batch shows whether they do. If a later one begins to, its forward pass is computed again.
    """

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        self._is_needed: bool | None = None

    def run(
        self, positions: Tensor, place: Sequence[int], forward: Callable[[], T], backward: Callable[[T], None]
    ) -> T:
        """Run both passes over the samples at `positions`, int64 `(n,)`, of the global batch; returns forward's result.

        Random numbers derive from a place in the run (seed, step), not from history: resuming needs no saved state.
        """
        before = self._seed(place)
        if self._is_needed is False:
            result = forward()
            if self._is_untouched(before):
                backward(result)
                return result
            self._seed(place)
        with SampleRandomness(positions):
            result = forward()
            self._is_needed = not self._is_untouched(before)
            backward(result)
        return result

    def _seed(self, place: Sequence[int]) -> list[Tensor]:
        """Seed the generators (`torch.manual_seed` takes 0.2 ms) and return their state."""
        digest = hashlib.blake2b(" ".join(map(str, place)).encode(), digest_size=8).digest()
        for generator in self._generators:
            generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        return [generator.get_state() for generator in self._generators]

    def _is_untouched(self, before: list[Tensor]) -> bool:
        return all(torch.equal(g.get_state(), state) for g, state in zip(self._generators, before, strict=True))


_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed number


def _mix64(x: Tensor) -> Tensor:
    """Mix int64 (the finalizer of SplitMix64: Steele, Lea and Flood, OOPSLA 2014, section 3)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


def _mix32(x: Tensor) -> Tensor:
    """Mix int32 in place (the finalizer of MurmurHash3, Appleby 2011, public domain)."""
    x ^= (x >> 16) & 0xFFFF
    x *= -2048144789
    x ^= (x >> 13) & 0x7FFFF
    x *= -1028477387
    x ^= (x >> 16) & 0xFFFF
    return x


def _dropout(
    self: SampleRandomness, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or not 0 < p < 1:
        return NotImplemented
    return _drop(self, input, p, input.shape, inplace)


def _feature_dropout(
    self: SampleRandomness, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """Drop whole channels of `(n, C, ...)`."""
    if not training or not 0 < p < 1 or input.dim() < 3:
        return NotImplemented
    return _drop(self, input, p, (*input.shape[:2], *[1] * (input.dim() - 2)), inplace)


def _drop(self: SampleRandomness, x: Tensor, p: float, mask_shape: Sequence[int], inplace: bool) -> Any:
    u = self.uniform(mask_shape, x.device)
    if u is None:
        return NotImplemented
    mask = (u >= p).to(x.dtype) / (1 - p)
    return x.mul_(mask) if inplace else x * mask


def _attention(
    self: SampleRandomness,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention as it is defined, where its weights are dropped: fused kernels draw numbers of their own."""
    if dropout_p == 0:
        return NotImplemented
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    weights = scores.softmax(-1)
    dropped = _dropout(self, weights, dropout_p)
    return (F.dropout(weights, dropout_p) if dropped is NotImplemented else dropped) @ value


def _backward(
    self: SampleRandomness,
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """Stay entered: a mode is off inside the function that it answers, but activation checkpoints recompute there.

    Hence the engine itself, which `torch.autograd.backward`, such a function too, calls.
    """
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    keep_graph = create_graph if retain_graph is None else retain_graph
    with self:
        run_backward(tensor, gradient, keep_graph, create_graph, tuple(inputs or ()))


def _multi_head_attention(self: SampleRandomness, *args: Any, **kwargs: Any) -> Any:
    """Run torch's own, whose inner calls find ours: a mode is off inside the function that it answers."""
    with _replaced("dropout", self), _replaced("scaled_dot_product_attention", self):
        return F.multi_head_attention_forward(*args, **kwargs)


@contextlib.contextmanager
def _replaced(name: str, mode: SampleRandomness) -> Iterator[None]:
    original = getattr(F, name)

    setattr(F, name, lambda *args, **kwargs: mode.__torch_function__(original, (), args, kwargs))
    try:
        yield
    finally:
        setattr(F, name, original)


def _bernoulli(self: SampleRandomness, input: Tensor, p: float | None = None, **kwargs: Any) -> Any:
    u = self.uniform(input.shape, input.device)
    if u is None or kwargs.get("generator") is not None:
        return NotImplemented
    return (u < (input if p is None else p)).to(input.dtype)


def _bernoulli_(self: SampleRandomness, input: Tensor, p: Tensor | float = 0.5, **kwargs: Any) -> Any:
    u = self.uniform(input.shape, input.device)
    if u is None or kwargs.get("generator") is not None:
        return NotImplemented
    return input.copy_(u < p)


def _uniform_(self: SampleRandomness, input: Tensor, a: float = 0.0, b: float = 1.0, **kwargs: Any) -> Any:
    u = self.uniform(input.shape, input.device)
    if u is None or kwargs.get("generator") is not None:
        return NotImplemented
    return input.copy_(a + (b - a) * u)


def _normal_(self: SampleRandomness, input: Tensor, mean: float = 0.0, std: float = 1.0, **kwargs: Any) -> Any:
    u = self.uniform(input.shape, input.device)
    if u is None or kwargs.get("generator") is not None:
        return NotImplemented
    return input.copy_(mean + std * _as_normal(u))


def _rand_like(self: SampleRandomness, input: Tensor, **kwargs: Any) -> Any:
    u = self.uniform(input.shape, torch.device(kwargs.get("device") or input.device))
    return NotImplemented if u is None else u.to(kwargs.get("dtype") or input.dtype)


def _randn_like(self: SampleRandomness, input: Tensor, **kwargs: Any) -> Any:
    u = self.uniform(input.shape, torch.device(kwargs.get("device") or input.device))
    return NotImplemented if u is None else _as_normal(u).to(kwargs.get("dtype") or input.dtype)


def _rand(self: SampleRandomness, *size: Any, **kwargs: Any) -> Any:
    return _factory(self, lambda u: u, size, kwargs)


def _randn(self: SampleRandomness, *size: Any, **kwargs: Any) -> Any:
    return _factory(self, _as_normal, size, kwargs)


def _factory(
    self: SampleRandomness, make: Callable[[Tensor], Tensor], size: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if kwargs.keys() - {"dtype", "device"}:
        return NotImplemented
    shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
    u = self.uniform(shape, torch.device(kwargs.get("device") or torch.get_default_device()))
    return NotImplemented if u is None else make(u).to(kwargs.get("dtype") or torch.get_default_dtype())


def _as_normal(u: Tensor) -> Tensor:
    """Turn uniform numbers into normal ones by the inverse of the distribution function."""
    normal: Tensor = torch.special.ndtri(u.double() + 2.0**-25).float()
    return normal


_OWN: dict[Any, Callable[..., Any]] = {
    torch.Tensor.backward: _backward,
    F.dropout: _dropout,
    F.dropout1d: _feature_dropout,
    F.dropout2d: _feature_dropout,
    F.dropout3d: _feature_dropout,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.Tensor.bernoulli_: _bernoulli_,
    torch.Tensor.uniform_: _uniform_,
    torch.Tensor.normal_: _normal_,
    torch.rand_like: _rand_like,
    torch.randn_like: _randn_like,
    torch.rand: _rand,
    torch.randn: _randn,
}
