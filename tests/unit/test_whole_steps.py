"""Every optimizer moves every number of a weight in 16 bits as it moves it in fp32, and twice alike."""

import dataclasses

import pytest
import torch
from torch import nn

from hvdtrain.optim.table import OPTIMIZERS, build_optimizer, with_name
from hvdtrain.optim.torch_class import torch_optimizers
from hvdtrain.settings import OptimConfig

# Below, at and above a vector of any processor, and many of them with a rest.
SHAPES = [(1,), (7,), (16,), (31,), (33,), (48,), (5, 3), (16, 27), (72, 16, 3, 3)]
# lr is the rate that every class takes; a step of each is well above what bfloat16 rounds away, and below 1.
RATE = 0.05


def moved(name, dtype, more):
    """Return the weights after three steps, from weights and along gradients that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(0)
    optim = with_name(OptimConfig(peak_lr=RATE, weight_decay=0.01), name)
    optim = dataclasses.replace(optim, **more)
    start = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    model = nn.Module()
    model.weights = nn.ParameterList(nn.Parameter(tensor.to(dtype)) for tensor in start)
    optimizer = build_optimizer(optim, model)
    for _ in range(3):
        for weight in model.weights:
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad = (gradient + gradient.sign()).bfloat16().to(dtype)
        optimizer.step()
        torch.full((5000,), 1e4).bfloat16()  # what a kernel reads that it has not written is not zero by chance
    return [weight.detach() for weight in model.weights]


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, {}) for name in (*OPTIMIZERS, *torch_optimizers())), ("sgd", {"momentum": 0.9, "nesterov": True})],
    ids=str,
)
def test_of_16_bits_each_number_moves_as_of_32(name, more):
    few, again, many = (moved(name, dtype, more) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32))
    for one, same, other in zip(few, again, many, strict=True):
        assert torch.equal(one, same)
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.03)
