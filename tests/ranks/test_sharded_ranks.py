"""`--optim.shard` on Horovod's own collectives: equal to undivided, and one run goes on with it and without it."""

import pytest
import torch
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError
from hvdtrain.optim.table import settings_class
from hvdtrain.rundir.checkpoint import load_checkpoint
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, Config, HealthConfig, TrainConfig
from hvdtrain.trainer import Task, fit, settle

STEPS = 6


def job_of(world, run_dir, name, shard, steps=STEPS):
    torch.manual_seed(0)
    layers = [nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 31), nn.LayerNorm(31), nn.Linear(31, 1)]
    x = torch.randn(44, 20, generator=torch.Generator().manual_seed(3)).double()
    data = TensorSamples(x, x.sin().sum(1, keepdim=True))
    config = Config(
        train=TrainConfig(steps=steps, global_batch_size=16, precision="fp64", max_grad_norm=0.5),
        optim=settings_class(name)(name=name, peak_lr=0.01, schedule="constant", shard=shard),
        checkpoint=CheckpointConfig(keep_last=None),
        health=HealthConfig(replica_check_every=1),
    )
    losses = {"loss_sums": lambda model, batch: {"loss": (model(batch[0]) - batch[1]).square().sum()}}
    task = Task(model=nn.Sequential(*layers), train_data=data, val_data=data, **losses)
    return settle(task, config, world, RunDirectory(run_dir), MetricLog(None, []))


def weights_after(job):
    fit(job)
    return {name: tensor.detach().clone() for name, tensor in job.task.model.state_dict().items()}


def largest_gap(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.ranks(2, 4)
def test_it_is_the_undivided_training_and_goes_on_with_it_and_without_it(world, shared_dir):
    name = "muon"  # divides by parameters, and AdamW's part of it by elements
    whole = weights_after(job_of(world, shared_dir / "whole", name, False))
    sharded = weights_after(job_of(world, shared_dir / "sharded", name, True))
    assert largest_gap(whole, job_of(world, shared_dir / "none", name, False).task.model.state_dict()) > 0
    assert largest_gap(whole, sharded) < 1e-12
    weights_after(job_of(world, shared_dir / "parts", name, True, steps=3))
    went_on = weights_after(job_of(world, shared_dir / "parts", name, True))
    assert largest_gap(went_on, sharded) == 0
    weights_after(job_of(world, shared_dir / "turns", name, True, steps=2))
    weights_after(job_of(world, shared_dir / "turns", name, False, steps=4))
    assert largest_gap(weights_after(job_of(world, shared_dir / "turns", name, True)), whole) < 1e-12
    if world.rank == 0:
        paths = [shared_dir / run / "checkpoints" / f"step-{STEPS:08d}" for run in ("whole", "sharded")]
        saved = [load_checkpoint(path).state["optimizer"] for path in paths]
        assert [group["params"] for group in saved[0]["param_groups"]] == [
            group["params"] for group in saved[1]["param_groups"]
        ]
        for number, entries in saved[0]["state"].items():
            assert largest_gap(entries, saved[1]["state"][number]) < 1e-12


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_loss_scaler_of_the_users_own_is_refused_on_all_ranks(world, fused):
    """It would look at this rank's part: ranks would leave out different steps, or wait for each other forever."""
    model = nn.Linear(8, 8)
    optimizer = world.wrap(torch.optim.AdamW(model.parameters(), fused=fused), model, shard=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    huge = float("inf") if world.rank == 0 else 1.0
    scaler.scale(model(torch.ones(2, 8)).sum() * huge).backward()
    with pytest.raises(ConfigError, match="bf16"):
        scaler.step(optimizer)


@pytest.mark.ranks(2, 4)
def test_clipping_by_the_norm_of_all_parts_is_clipping(world):
    """As docs/how-to/big-models.md has it."""
    torch.manual_seed(0)
    model = nn.Linear(64, 300)
    whole = nn.Linear(64, 300)
    whole.load_state_dict(model.state_dict())
    x = torch.arange(64.0)[None] * (world.rank + 1)
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, shard=True)
    other = world.wrap(torch.optim.SGD(whole.parameters(), lr=0.1), whole)
    for one, net in ((optimizer, model), (other, whole)):
        net(x).square().mean().backward()
        one.synchronize()
        parts = [part for group in one.param_groups for part in group["params"]]
        square = torch.nn.utils.get_total_norm([part.grad for part in parts]) ** 2
        norm = (world.all_reduce(square, "sum") if one is optimizer else square) ** 0.5
        torch.nn.utils.clip_grads_with_norm_(parts, 0.5, norm)
        assert norm > 0.5
        one.step()
    assert torch.allclose(model.weight, whole.weight, rtol=1e-6)
