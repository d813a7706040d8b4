"""What `bench` says of throughput, and what it compares images that are read with."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from digits import write_digits

from hvdtrain.process.launch import Launch
from hvdtrain.process.progress import Progress
from hvdtrain.recipes import load_recipe
from hvdtrain.trainer.peaks import data_sheet_peak, is_part_of_card
from hvdtrain.verbs.bench import command, measure
from hvdtrain.verbs.bench.measure import PARTS, variants
from hvdtrain.verbs.bench.report import row_of, throughput_lines
from hvdtrain.verbs.phase_clock import PhaseClock
from hvdtrain.world import SoloWorld


def test_throughput_is_horovods_form():
    """As horovod's pytorch_synthetic_benchmark.py: means of rates, and 1.96 times their deviation."""
    parts = [dict.fromkeys(PARTS, 0.0)] * 3
    variant = SimpleNamespace(
        name="as it is", num_ranks=2, steps_s=[0.5, 0.25, 1.0], parts_s=parts, targets_per_step=20, samples_per_step=20
    )
    row = row_of(variant, variant)
    assert row.units_per_s_a_rank == pytest.approx((70 / 3, 1.96 * 12.4721913))
    assert throughput_lines(row, "images", 2) == "images/s a rank: 23.3 +-24.4\nimages/s on 2 ranks: 46.7 +-48.9"
    assert row.as_dict("images")["images_per_s"] == 40
    assert row.as_dict("images")["images_per_s_a_rank"] == row.units_per_s_a_rank


@pytest.mark.parametrize(
    ("card", "bf16", "fp16"),
    [
        ("NVIDIA H100 NVL", 835e12, 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 989e12),
        ("NVIDIA A10G", 70e12, 70e12),
        ("NVIDIA A10", 125e12, 125e12),
        ("NVIDIA GB200", 2500e12, 2500e12),
        ("Tesla T4", None, 65e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA H100 of tomorrow", None, None),
    ],
)
def test_a_peak_is_that_of_the_very_card(card, bf16, fp16):
    assert data_sheet_peak(card, torch.bfloat16) == bf16
    assert data_sheet_peak(card, torch.float16) == fp16
    assert data_sheet_peak(card, torch.float32) is None
    assert is_part_of_card(card) == ("MIG" in card)


def test_variants_on_a_gpu_are_built_measured_and_freed_one_by_one(monkeypatch, tmp_path):
    """As there, on the CPU: never two models at a time, and whole steps without a clock in them."""
    monkeypatch.setattr(measure, "are_measured_apart", lambda device: True)
    monkeypatch.setattr(
        measure, "_KNOBS", (("train", "precision", ("bf16", "fp64")), ("train", "max_grad_norm", (2.0,)))
    )
    write_digits(tmp_path)
    recipe = load_recipe("mnist")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=str(tmp_path)))
    world = SoloWorld(torch.device("cpu"), Launch("none"))
    alive, most, clocks = [], 0, []
    seconds = measure.Variant._seconds

    def noted(variant, steps, progress):
        clocks.append((type(progress), found := seconds(variant, steps, progress)))
        return found

    monkeypatch.setattr(measure.Variant, "_seconds", noted)

    class Watched(measure.Possible):
        def __iter__(self):
            nonlocal most
            for variant in super().__iter__():
                alive.append(weakref.ref(variant.rehearsal[1].model))
                most = max(most, sum(ref() is not None for ref in alive))
                yield variant

    options = SimpleNamespace(warmup=1, rounds=2, steps=1)
    built, flops, memory = command._one_by_one(Watched(recipe, recipe.build(str), world, True), options, str)
    assert len(built) > 2
    assert most == 1
    assert all(len(variant.steps_s) == len(variant.parts_s) == 2 for variant in built)
    # What waits for the GPU at each part is not in the time of a step: that is taken without, the parts afterwards.
    assert [kind for kind, _ in clocks] == [Progress, PhaseClock] * (len(clocks) // 2)
    whole = [found for kind, found in clocks if kind is Progress]
    assert {second for variant in built for second in variant.steps_s} <= set(whole)
    assert flops > 0
    assert memory > 0


def test_images_that_are_read_are_compared_with_made_up_ones(tmp_path):
    recipe = load_recipe("resnet")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, root=str(tmp_path)))
    found = dict(variants(recipe, 1, torch.device("cpu")))
    assert [*found][:2] == ["as it is", "--data.synthetic"]
    assert found["--data.synthetic"].data.synthetic
    assert "--data.synthetic" not in dict(variants(found["--data.synthetic"], 1, torch.device("cpu")))
    assert "--data.synthetic" not in dict(variants(load_recipe("lm"), 1, torch.device("cpu")))
