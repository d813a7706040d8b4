"""Weights that are read from elsewhere: neither saved nor sent, but compared."""

import copy

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.errors import ConfigError, DivergedError
from hvdtrain.models.elsewhere import keep_elsewhere, kept_elsewhere, weights_digest
from hvdtrain.models.weights import check_can_be_saved, has_plain_state, load_model_weights, model_weights


def adapted(seed=0):
    """Return a network whose first layer is frozen, its weight tied to another one's, and kept elsewhere."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    keep_elsewhere(model)
    return model


def test_they_are_not_in_the_state_and_loading_leaves_them():
    model, other = adapted(), adapted(seed=1)
    assert kept_elsewhere(model) == {"0.weight", "0.bias", "2.weight"}
    weights = model_weights(model)
    assert not kept_elsewhere(model) & weights.keys()
    assert {"1.weight", "1.running_mean", "2.bias", "3.weight"} <= weights.keys()
    before = [parameter.detach().clone() for parameter in (other[0].weight, other[0].bias)]
    versions = [parameter._version for parameter in other[0].parameters()]
    load_model_weights(other, weights)
    assert torch.equal(other[3].weight, model[3].weight)
    assert all(map(torch.equal, before, (other[0].weight, other[0].bias)))
    assert versions == [parameter._version for parameter in other[0].parameters()]  # not even with themselves
    check_can_be_saved(model)
    assert has_plain_state(model)
    assert kept_elsewhere(copy.deepcopy(model)) == kept_elsewhere(model)
    assert not kept_elsewhere(model) & copy.deepcopy(model).state_dict().keys()


def test_other_names_are_still_missed():
    model = adapted()
    state = model.state_dict()
    del state["3.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*3\.bias"):
        model.load_state_dict(state)


def test_one_that_is_unfrozen_would_be_lost():
    model = adapted()
    model[0].bias.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"0\.bias was unfrozen, and is in no checkpoint"):
        model.state_dict()


def test_the_digest_knows_every_bit_and_every_name():
    plain, same = nn.Linear(3, 3), nn.Linear(3, 3)
    same.load_state_dict(plain.state_dict())
    assert weights_digest(plain) == weights_digest(same)
    seen = {weights_digest(plain), weights_digest(nn.Sequential(same))}
    with torch.no_grad():
        same.weight[2, 2] = torch.nextafter(same.weight[2, 2], torch.tensor(9.0))
    seen.add(weights_digest(same))
    seen.add(weights_digest(copy.deepcopy(plain).double()))
    assert len(seen) == 4


def test_they_are_not_sent_and_compared_all_the_same():
    models = [adapted(seed) for seed in (0, 1)]  # ranks are threads, and the generator is the process's
    run_ranks(2, lambda world: world.broadcast_state(models[world.rank]))
    ours, theirs = models
    assert torch.equal(ours[3].weight, theirs[3].weight)
    assert not torch.equal(ours[0].weight, theirs[0].weight)
    named = [dict(model.named_parameters()) for model in models]
    with pytest.raises(DivergedError, match=r"0\.weight on rank 1 differs"):
        run_ranks(2, lambda world: world.check_replicas(named[world.rank], "test"))
