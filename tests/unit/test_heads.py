"""Heads of models of transformers: the loss in parts is the loss at once, and not all logits exist."""

import pytest
import torch
from families import as_batch, tiny_model
from hugging import import_transformers
from torch import nn

from hvdtrain.recipes.transformers_models.heads import OwnHead, ProductHead, find_own_head
from hvdtrain.recipes.transformers_models.probe import find_way

import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are none of ours
POOL = torch.arange(5, 300)


def rows_of_logits(model, head, few):
    """Return loss and gradients in parts of `few` positions, and of how many positions logits existed at a time."""
    way = find_way(model, POOL, 24)
    assert way.loss.head == head
    generator = torch.Generator().manual_seed(0)
    batch = as_batch([[torch.randint(5, 300, (n,), generator=generator) for n in (9, 15)] for _ in range(2)])
    rows = []
    layer = model.get_output_embeddings()
    hook = layer.register_forward_hook(lambda module, args, output: rows.append(output[..., 0].numel()))
    results = []
    for loss_bytes in (4 * 320 * few, 2**28):
        rows.clear()
        model.zero_grad()
        loss = way.loss(model, batch, loss_bytes)["loss"]
        loss.backward()
        largest = max(rows, default=0)
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, largest))
    hook.remove()
    return results


@pytest.mark.parametrize(
    ("family", "head", "settings"),
    [
        ("gemma2", OwnHead("model", 320), {"final_logit_softcapping": 0.05}),  # a cap that shows in small logits
        ("falcon_h1", OwnHead("model", 320), {"lm_head_multiplier": 3.0}),
        ("phi", OwnHead("model", 320), {}),  # a bias
        ("bert", OwnHead("bert", 320), {}),  # further layers
        ("llama", ProductHead(), {}),
    ],
)
def test_not_all_logits_exist(family, head, settings):
    model = tiny_model(family, **settings).eval()
    if not settings and family != "llama":
        model.get_output_embeddings().bias.data.normal_()
    (loss, gradients, rows), (expected, whole, all_rows) = rows_of_logits(model, head, 7)
    assert rows <= 7
    assert all_rows > 30
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert (gradient - whole[name]).norm() <= 1e-4 * whole[name].norm() + 1e-7, name


def test_a_head_that_draws_random_numbers_has_whole_logits():
    model = tiny_model("gpt2")
    model.lm_head = nn.Sequential(nn.Dropout(0.5), model.lm_head)
    assert find_way(model, POOL, 24).loss.head is None


def test_a_head_that_mixes_positions_has_whole_logits():
    class Summed(nn.Linear):
        def forward(self, x):
            return super().forward(x.cumsum(1))

    model = tiny_model("llama")
    head = model.lm_head
    model.lm_head = Summed(32, 320, bias=False)
    model.lm_head.weight = head.weight
    model.eval()
    inputs = {"input_ids": POOL[None, :24]}
    with torch.no_grad():
        assert find_own_head(model, inputs, model(**inputs).logits, 1e-4) is None


def test_a_model_is_left_as_it_was():
    model = tiny_model("cohere")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    way = find_way(model, POOL, 24)
    way.loss(model, as_batch([[POOL[:24]]]), 4 * 320 * 5)["loss"].backward()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks
