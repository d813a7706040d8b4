"""Attention by oneDNN's products: what torch's attention is, to bfloat16's rounding, forward and backward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdtrain.models.attention import use_onednn_attention
from hvdtrain.models.private_attention import can_be_replaced
from hvdtrain.process.launch import Launch
from hvdtrain.settings import Config, ModelConfig
from hvdtrain.trainer.model import prepare_model
from hvdtrain.trainer.precision import has_products, is_fast_in_bf16
from hvdtrain.world import SoloWorld

pytestmark = [
    pytest.mark.skipif(not has_products(torch.bfloat16), reason="oneDNN has no products in bfloat16 here"),
    pytest.mark.skipif(not can_be_replaced(), reason="kernels of this torch cannot be replaced"),
]


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    yield
    use_onednn_attention(False)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return numbers as a decoder's heads have them: those of a token beside each other."""
    samples, heads, tokens, width = shape
    numbers = torch.randn(samples, tokens, heads, width, generator=torch.Generator().manual_seed(seed))
    return numbers.to(dtype).transpose(1, 2)


def case(queries: tuple[int, ...], keys: tuple[int, ...], **more: Any) -> Any:
    asked = (f"{name}={tuple(value.shape) if isinstance(value, Tensor) else value}" for name, value in more.items())
    return pytest.param(queries, keys, more, id="-".join((str(queries), str(keys), *asked)).replace(" ", ""))


def lower(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool).tril()


def without_some_rows() -> Tensor:
    mask = lower(2, 1, 128, 128)
    mask[1, :, 5:9] = False
    return mask


CASES = [
    case((2, 4, 128, 64), (2, 4, 128, 64), is_causal=True),
    case((2, 4, 128, 64), (2, 4, 128, 64)),
    case((2, 8, 96, 32), (2, 2, 96, 32), is_causal=True, enable_gqa=True),
    case((1, 4, 300, 32), (1, 4, 300, 32), is_causal=True),  # blocks of 128, the last one smaller
    case((1, 2, 1100, 32), (1, 1, 1100, 32), is_causal=True, enable_gqa=True),  # blocks of 256
    case((2, 4, 64, 64), (2, 4, 200, 64)),  # as a decoder looks at an encoder
    case((2, 4, 64, 64), (2, 4, 200, 64), is_causal=True),
    case((2, 4, 200, 64), (2, 4, 64, 64), is_causal=True),
    case((2, 4, 128, 64), (2, 4, 128, 64), scale=0.3, is_causal=True),
    case((2, 4, 128, 64), (2, 4, 128, 64), attn_mask=lower(128, 128)),
    case((2, 4, 128, 64), (2, 4, 128, 64), attn_mask=lower(2, 1, 128, 128)),
    case((2, 4, 128, 64), (2, 4, 128, 64), attn_mask=torch.arange(128) < torch.tensor([[[[100]]], [[[128]]]])),
    case((2, 4, 300, 64), (2, 4, 300, 64), attn_mask=draw(1, 4, 300, 300, seed=9)),  # positions, as added numbers
    case((2, 4, 128, 64), (2, 4, 128, 64), attn_mask=without_some_rows()),
]


@pytest.mark.parametrize(("queries", "keys", "more"), CASES)
def test_it_is_torchs_attention(queries: tuple[int, ...], keys: tuple[int, ...], more: dict[str, Any]) -> None:
    inputs = [draw(*queries, seed=1), draw(*keys, seed=2), draw(*keys, seed=3)]
    gradient = draw(*queries, seed=4)

    def run(dtype: torch.dtype, is_ours: bool) -> list[Tensor]:
        use_onednn_attention(is_ours)
        own = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
        y = F.scaled_dot_product_attention(*own, **more)
        y.backward(gradient.to(dtype))
        return [tensor.detach().double() for tensor in (y, *(tensor.grad for tensor in own)) if tensor is not None]

    if "attn_mask" in more and more["attn_mask"].is_floating_point():
        exact = run_in_fp64(inputs, gradient, more)
    else:
        exact = run(torch.float64, is_ours=False)
    torchs, ours = run(torch.bfloat16, is_ours=False), run(torch.bfloat16, is_ours=True)
    assert not all(torch.equal(a, b) for a, b in zip(torchs, ours, strict=True)), "torch's kernel took it"
    for by_torch, mine, right in zip(torchs, ours, exact, strict=True):
        assert mine.isfinite().all()
        error, torchs_error = ((found - right).norm() / right.norm() for found in (mine, by_torch))
        assert error < max(3.5 * torchs_error, 0.004)  # scores are rounded once more


def run_in_fp64(inputs: list[Tensor], gradient: Tensor, more: dict[str, Any]) -> list[Tensor]:
    own = [tensor.double().requires_grad_() for tensor in inputs]
    y = F.scaled_dot_product_attention(*own, **more | {"attn_mask": more["attn_mask"].double()})
    y.backward(gradient.double())
    return [tensor.detach() for tensor in (y, *(tensor.grad for tensor in own)) if tensor is not None]


@pytest.mark.parametrize(
    ("tensor", "more"),
    [
        (draw(2, 4, 128, 64, dtype=torch.float32), {"is_causal": True}),
        (draw(2, 4, 128, 64, dtype=torch.float64), {"is_causal": True}),
        (draw(2, 4, 16, 16), {"is_causal": True}),  # too small to gain
        (draw(2, 4, 128, 64)[0], {"is_causal": True}),
        (draw(2, 4, 0, 64), {}),
    ],
    ids=["fp32", "fp64", "small", "three-dimensions", "empty"],
)
def test_the_rest_stays_torchs_bit_for_bit(tensor: Tensor, more: dict[str, Any]) -> None:
    found = []
    for is_ours in (False, True):
        use_onednn_attention(is_ours)
        own = tensor.clone().requires_grad_()
        y = F.scaled_dot_product_attention(own, own, own, **more)
        y.backward(torch.ones_like(y))
        assert own.grad is not None
        found.append((y.detach(), own.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("is_first_ours", [True, False])
def test_a_backward_pass_is_that_of_its_forward_pass(is_first_ours: bool) -> None:
    tensor, found = draw(2, 4, 128, 64), []
    for is_ours_later in (True, False):
        own = tensor.clone().requires_grad_()
        use_onednn_attention(is_first_ours)
        y = F.scaled_dot_product_attention(own, own, own, is_causal=True)
        use_onednn_attention(is_ours_later)
        y.backward(torch.ones_like(y))
        assert own.grad is not None
        assert own.grad.isfinite().all()
        found.append(own.grad)
    assert torch.equal(*found)


def test_autocast_also_during_the_backward_pass() -> None:
    use_onednn_attention(True)
    layer = nn.MultiheadAttention(128, 2, batch_first=True)
    x = torch.randn(4, 128, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x, x, x, need_weights=False)
        y.float().square().sum().backward()
    use_onednn_attention(False)
    assert x.grad is not None
    grad, x.grad = x.grad, None
    layer(x, x, x, need_weights=False)[0].square().sum().backward()
    assert x.grad is not None
    assert (grad - x.grad).norm() < 0.03 * x.grad.norm()


def test_a_sample_does_not_depend_on_those_beside_it() -> None:
    use_onednn_attention(True)
    tensor = draw(6, 4, 128, 64)
    whole = F.scaled_dot_product_attention(tensor, tensor, tensor, is_causal=True)
    parts = [F.scaled_dot_product_attention(*[part] * 3, is_causal=True) for part in tensor.split([1, 2, 3])]
    assert torch.equal(whole, torch.cat(parts))


def test_numbers_that_are_none_stay_none() -> None:
    use_onednn_attention(True)
    tensor = draw(2, 4, 128, 64)
    tensor[1, 2, 3, 4] = torch.nan
    own = tensor.clone().requires_grad_()
    F.scaled_dot_product_attention(own, own, own, is_causal=True).sum().backward()
    assert own.grad is not None
    assert own.grad[1, 2].isnan().any()
    assert own.grad[0].isfinite().all()


@pytest.mark.skipif(not is_fast_in_bf16(torch.device("cpu")), reason="this CPU does not multiply bfloat16")
def test_training_has_it_unless_torch_is_asked_for() -> None:
    tensor, world = draw(2, 4, 128, 64), SoloWorld(torch.device("cpu"), Launch("none"))
    found = {}
    for library in ("torch", "onednn", "auto"):
        prepare_model(nn.Linear(1, 1), Config(model=ModelConfig(linear=cast(Any, library))), world)
        found[library] = F.scaled_dot_product_attention(tensor, tensor, tensor, is_causal=True)
    assert torch.equal(found["auto"], found["onednn"])
    assert not torch.equal(found["auto"], found["torch"])


def test_putting_it_in_is_silent() -> None:
    program = "from hvdtrain.models.attention import use_onednn_attention as use; use(True)"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)
