"""Image classifiers by name: each family of torchvision builds, and sees images or is refused in a sentence."""

import pytest
import torch
from torch import nn

from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.errors import ConfigError
from hvdtrain.models.small_resnet import DEPTHS
from hvdtrain.recipes.image_models import build_classifier, model_names

# The smallest of each family.
FAMILIES = (
    "resnet18",
    "resnext50_32x4d",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "googlenet",
    "squeezenet1_1",
    "vit_b_16",
)


def test_names_are_torchvisions_and_small_ones():
    models = import_torchvision("torchvision.models")
    assert {*models.list_models(module=models)} < {*model_names()}
    assert "resnet20" in model_names()
    assert "fcn_resnet50" not in model_names()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_has_the_classes_of_the_data(name):
    model = build_classifier(name, 7, 64, seed=0)
    assert model.training
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_weights_follow_from_the_seed():
    one, same, other = (build_classifier("resnet20", 3, 16, seed=seed).conv1.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "resnet20"])
def test_blocks_begin_as_the_identity(name):
    for zero_gamma in (True, False):
        model = build_classifier(name, 3, 64, seed=0, zero_gamma=zero_gamma)
        zeros = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()]
        blocks = [m for m in model.modules() if hasattr(m, "conv2")]
        assert len(zeros) == (len(blocks) if zero_gamma else 0)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27e6), (32, 0.46e6), (56, 0.85e6), (110, 1.7e6)])
def test_small_networks_are_those_of_the_paper(depth, parameters):
    """Table 6 of arXiv:1512.03385."""
    model = build_classifier(f"resnet{depth}", 10, 32, seed=0)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth == DEPTHS[f"resnet{depth}"]


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("alexnet", 16, "cannot see images of 16x16"),
        ("vit_b_16", 100, "cannot be built for images of 100x100"),
        ("resnett50", 64, "did you mean 'resnet50'"),
        ("fcn_resnet50", 64, "no classification model"),
    ],
)
def test_what_does_not_fit_is_said(name, size, says):
    with pytest.raises(ConfigError, match=says) as caught:
        build_classifier(name, 7, size, seed=0)
    assert len(str(caught.value).splitlines()) == 1
