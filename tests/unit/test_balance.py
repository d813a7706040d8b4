"""The balancing loss of mixtures of experts, against the one of transformers."""

import pytest
import torch
from families import VOCABULARY, as_batch, tiny_model
from hugging import import_transformers

from hvdtrain.errors import ConfigError
from hvdtrain.recipes.transformers_models.probe import find_way

import_transformers()
pytestmark = pytest.mark.filterwarnings("default")  # transformers' own are none of ours
LENGTH = 24


def way_through(model):
    return find_way(model, torch.arange(5, 300), LENGTH)


def some_samples():
    generator = torch.Generator().manual_seed(0)
    lengths = [[LENGTH], [7, LENGTH - 7], [3, 4, 5]]  # the last is filled up
    return [[torch.randint(5, 300, (n,), generator=generator) for n in sample] for sample in lengths]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "jamba", "granitemoehybrid"])
def test_one_sample_has_the_loss_and_gradient_of_transformers(family):
    model = tiny_model(family, output_router_logits=True)
    loss = way_through(model).loss
    model.eval()
    document = some_samples()[0][0]
    theirs = model(input_ids=document[None], labels=document[None])
    ours = loss(model, as_batch([[document]]), 4 * VOCABULARY * 7)
    targets = LENGTH - 1
    torch.testing.assert_close(ours["balance_loss"] / targets, theirs.aux_loss, rtol=1e-5, atol=0)
    cross_entropy = theirs.loss - model.router_aux_loss_coef * theirs.aux_loss
    torch.testing.assert_close(ours["loss"] / targets, cross_entropy, rtol=1e-5, atol=0)
    assert model.router_aux_loss_coef > 0
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(theirs.loss, parameters, allow_unused=True)
    found = torch.autograd.grad(ours["loss"] / targets, parameters, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "jamba"])  # packed, and in rows
def test_it_does_not_matter_how_a_batch_is_cut(family):
    model = tiny_model(family, output_router_logits=True)
    loss = way_through(model).loss
    model.eval()
    batch = as_batch(some_samples())
    with torch.no_grad():
        together = loss(model, batch)["balance_loss"]
        apart = sum(loss(model, tuple(part[i : i + 1] for part in batch))["balance_loss"] for i in range(3))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)


def test_what_fills_a_sample_up_is_not_routed():
    model = tiny_model("mixtral", output_router_logits=True)
    loss = way_through(model).loss
    model.eval()
    document = some_samples()[0][0][:9]
    filled = as_batch([[document], [torch.arange(5, 5 + LENGTH)]])
    with torch.no_grad():
        alone = loss(model, as_batch([[document]]))["balance_loss"]
        part = loss(model, tuple(column[:1] for column in filled))["balance_loss"]
    torch.testing.assert_close(part, alone, rtol=1e-5, atol=0)


def test_there_is_none_where_it_is_not_asked_for():
    assert way_through(tiny_model("mixtral")).loss.balance is None
    assert way_through(tiny_model("llama")).loss.balance is None


def test_an_unknown_balancing_loss_is_refused(monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    model = tiny_model("mixtral", output_router_logits=True)
    known = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *args: 9 * known(*args))
    with pytest.raises(ConfigError, match="set output_router_logits to false"):
        way_through(model)
