"""What `bench` says of throughput, and what it compares images that are read with."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from hvdtrain.recipes import load_recipe
from hvdtrain.verbs.bench.measure import PARTS, variants
from hvdtrain.verbs.bench.report import row_of, throughput_lines


def test_throughput_is_horovods_form():
    """As horovod's pytorch_synthetic_benchmark.py: means of rates, and 1.96 times their deviation."""
    job = SimpleNamespace(world=SimpleNamespace(size=2))
    parts = [dict.fromkeys(PARTS, 0.0)] * 3
    variant = SimpleNamespace(
        name="as it is", job=job, steps_s=[0.5, 0.25, 1.0], parts_s=parts, targets_per_step=20, samples_per_step=20
    )
    row = row_of(variant, variant)
    assert row.units_per_s_a_rank == pytest.approx((70 / 3, 1.96 * 12.4721913))
    assert throughput_lines(row, "images", 2) == "images/s a rank: 23.3 +-24.4\nimages/s on 2 ranks: 46.7 +-48.9"
    assert row.as_dict("images")["images_per_s"] == 40
    assert row.as_dict("images")["images_per_s_a_rank"] == row.units_per_s_a_rank


def test_images_that_are_read_are_compared_with_made_up_ones(tmp_path):
    recipe = load_recipe("resnet")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=str(tmp_path)))
    found = dict(variants(recipe, 1, torch.device("cpu")))
    assert [*found][:2] == ["as it is", "--data.synthetic"]
    assert found["--data.synthetic"].data.synthetic
    assert "--data.synthetic" not in dict(variants(found["--data.synthetic"], 1, torch.device("cpu")))
    assert "--data.synthetic" not in dict(variants(load_recipe("lm"), 1, torch.device("cpu")))
