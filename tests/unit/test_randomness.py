"""Random numbers belong to samples: they do not depend on how a global batch is cut into micro-batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvdtrain.trainer.randomness import MicroBatchRandomness, SampleRandomness

CPU = torch.device("cpu")
SPLITS = {"whole": [6], "uneven": [2, 3, 1], "single": [1] * 6}


class Layers(nn.Module):
    """Every kind of random number that a model may draw."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
        self.channels = nn.Dropout1d(0.4)
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        x = self.block(x)
        x = x * (torch.rand(len(x)) > 0.3)[:, None, None] + torch.randn_like(x)
        x = x + torch.empty_like(x).bernoulli_(0.3) + torch.zeros_like(x).normal_(1.0, 2.0)
        heads = x[:, None]
        x = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2, is_causal=True)[:, 0]
        return self.channels(checkpoint(lambda y: F.dropout(self.linear(y), 0.5), x, use_reentrant=False))


def run(model, x, sizes, *place):
    """Return outputs and gradients of a batch, cut into micro-batches of these sizes."""
    model.zero_grad()
    outputs = []

    def backward(output):
        output.square().sum().backward()
        outputs.append(output.detach())

    randomness = MicroBatchRandomness(CPU)
    for positions in torch.arange(len(x)).split(sizes):
        randomness.run(positions, place, lambda positions=positions: model(x[positions]), backward)
    return torch.cat(outputs), [p.grad.clone() for p in model.parameters()]


def test_micro_batches_draw_what_the_whole_batch_draws():
    torch.manual_seed(0)
    model, x = Layers().double(), torch.randn(6, 5, 16).double()
    whole, gradients = run(model, x, SPLITS["whole"], 1, 2)
    for sizes in SPLITS.values():
        output, own = run(model, x, sizes, 1, 2)
        assert (output - whole).abs().max() < 1e-12
        assert max((a - b).abs().max() for a, b in zip(own, gradients, strict=True)) < 1e-9
    other, _ = run(model, x, SPLITS["whole"], 1, 3)
    assert (other - whole).abs().max() > 0.1  # another step, other numbers


def test_samples_differ_and_numbers_are_uniform():
    torch.manual_seed(0)
    with SampleRandomness(torch.arange(64)):
        u, again, normal = torch.rand(64, 5000), torch.rand(64, 5000), torch.randn(64, 5000)
        dropped = F.dropout(torch.ones(64, 5000), 0.1)
    assert u.mean().item() == pytest.approx(0.5, abs=0.003)
    assert u.var().item() == pytest.approx(1 / 12, abs=0.001)
    assert (normal.mean().item(), normal.std().item()) == pytest.approx((0, 1), abs=0.01)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert dropped.max().item() == pytest.approx(1 / 0.9)
    correlations = torch.corrcoef(torch.cat((u, again))) - torch.eye(128)
    assert correlations.abs().max() < 0.09  # 5 sigma and more of 1/sqrt(5000)
    assert u.unique().numel() > 0.98 * u.numel()


def test_a_model_that_draws_nothing_is_left_alone_until_it_does():
    randomness = MicroBatchRandomness(CPU)
    calls = []

    def forward(draws):
        calls.append(torch.overrides._get_current_function_mode() is not None)
        return torch.rand(3) if draws else None

    positions = torch.arange(3)
    for draws in (False, False, True, True):
        randomness.run(positions, (0, 1), lambda draws=draws: forward(draws), lambda _: None)
    assert calls == [True, False, False, True, True]  # the third is computed again, with its own numbers


def test_tensors_without_the_samples_in_front_are_drawn_alike_for_all():
    drawn = []
    for positions in (torch.tensor([0, 1]), torch.tensor([2, 3])):
        MicroBatchRandomness(CPU).run(positions, (5,), lambda: torch.rand(7), drawn.append)
    assert torch.equal(*drawn)
