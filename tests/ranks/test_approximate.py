"""Codecs that remember what they leave out, in whole trainings on real ranks: equal, resumed, verified."""

import dataclasses

import pytest
import torch
from test_local_updates import job_of as any_job_of
from test_local_updates import largest_gap, trained, weights
from test_verify import failures, small, verified

from hvdtrain.errors import ConfigError
from hvdtrain.settings import CommConfig
from hvdtrain.trainer import fit
from hvdtrain.trainer.wire import check_compression
from hvdtrain.world import Int8, PowerSGD, TopK

CODECS = ["powersgd:1", "topk:0.1", "int8"]


def job_of(world, run_dir, compression, **options):
    comm = {"sync": "every-step", "period": 50, "compression": compression, "compression_min_size": 6, **options}
    return any_job_of(world, run_dir, **comm)


def alike(world, tensors, name):
    world.check_replicas(dict(tensors), name)
    return True


@pytest.mark.ranks(2, 4)
@pytest.mark.same_on_gloo
@pytest.mark.parametrize("kind", [lambda: PowerSGD(1, 6), lambda: TopK(0.1, 6), lambda: Int8(6)])
def test_nothing_is_lost_on_the_wire(world, kind):
    """The sum of the means, and of what the ranks remember, is that of the mean gradients; all ranks have the same."""
    codec = kind()
    model = torch.nn.ParameterDict(
        {"wide": torch.nn.Parameter(torch.zeros(8, 300)), "small": torch.nn.Parameter(torch.zeros(3))}
    )
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, compression=codec)
    exact = torch.zeros(8, 300).double()
    handed = world.handed_bytes["gradients"]
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + world.rank)
        own = torch.randn(8, 300, generator=generator)
        exact += own.double()
        optimizer.zero_grad()
        ((model["wide"] * own).sum() + model["small"].sum()).backward()
        optimizer.step()
    exact = world.all_reduce(exact, "mean", "exact")
    kept = world.all_reduce(codec.left_over()["wide"].double(), "sum", "kept")
    assert (exact + model["wide"].detach().double() - kept).abs().max() < 1e-5  # the weights are minus what was sent
    assert kept.abs().max() > 1e-3
    assert model["small"].detach().tolist() == [-3.0] * 3
    assert alike(world, dict(model.items()), "alike")
    assert 0 < world.handed_bytes["gradients"] - handed < 3 * 4 * 2403 * (1 if world.size < 4 else 2)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("compression", CODECS)
def test_a_run_goes_on_bitwise(world, shared_dir, compression):
    whole = trained(job_of(world, shared_dir / "whole", compression, compression_warmup_steps=2))
    exact = trained(job_of(world, shared_dir / "exact", "none", compression_min_size=1024))
    cut = dataclasses.replace(job_of(world, shared_dir / "cut", compression, compression_warmup_steps=2, steps=6))
    fit(cut)
    went_on = trained(job_of(world, shared_dir / "cut", compression, compression_warmup_steps=2), 4)
    assert went_on.step == whole.step
    assert largest_gap(weights(went_on.model), weights(whole.model)) == 0
    assert largest_gap(weights(exact.model), weights(whole.model)) > 1e-6
    assert alike(world, weights(whole.model), "alike")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("outer", ["average", "nesterov"])
@pytest.mark.parametrize("compression", ["int8", "powersgd:1"])
def test_updates_of_local_training_are_compressed(world, shared_dir, outer, compression):
    """The run is cut within a period, behind an average: what that has left out is in the checkpoint."""
    local = {"sync": "local", "period": 4, "outer": outer, "compression_min_size": 6}
    whole = trained(any_job_of(world, shared_dir / "whole", compression=compression, **local))
    exact = trained(any_job_of(world, shared_dir / "exact", sync="local", period=4, outer=outer))
    fit(any_job_of(world, shared_dir / "cut", compression=compression, **local, steps=6))
    went_on = trained(any_job_of(world, shared_dir / "cut", compression=compression, **local), 4)
    assert largest_gap(weights(went_on.model), weights(whole.model)) == 0
    assert 0 < largest_gap(weights(exact.model), weights(whole.model)) < (1e-2 if compression == "int8" else 1)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("compression", CODECS)
def test_verify_says_what_holds(world, shared_dir, compression):
    comm = CommConfig(compression=compression, compression_min_size=6, compression_warmup_steps=50)
    rows = verified(world, shared_dir, small(comm=comm))
    assert failures(rows) == []
    (row,) = [row for row in rows if row.status == "not run"]
    assert row.number == 2
    assert "another training than on one rank" in row.advice
    (average,) = [row for row in rows if row.number == 4]
    assert "what is kept" in average.name
    assert average.status == "pass"


def test_a_loss_scale_is_refused(world):
    with pytest.raises(ConfigError, match=r"use --train\.precision bf16"):
        check_compression(small(comm=CommConfig(compression="int8"), precision="fp16"))
    check_compression(small(comm=CommConfig(compression="bf16"), precision="fp16"))
