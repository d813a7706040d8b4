"""The timeline of several ranks: one file, one clock, and nothing of it in the weights."""

import json

import pytest
import torch
from trace_format import faults_of

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, ProfileConfig, TrainConfig
from hvdtrain.trainer import Recipe, Task, fit, settle
from hvdtrain.world.clocks import clock_offsets


class Lines(MetricLog):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(None, [])
        self.said = []

    def say(self, text):
        self.said.append(text)


class Wide(Recipe):
    """Two layers whose gradients are two buckets."""

    def build(self, say):
        torch.manual_seed(0)
        x = torch.randn(64, 16)
        data = TensorSamples(x, x.sum(1, keepdim=True))

        def loss_sums(model, batch):
            return {"loss": (model(batch[0]) - batch[1]).square().sum()}

        model = torch.nn.Sequential(torch.nn.Linear(16, 700), torch.nn.Linear(700, 700), torch.nn.Linear(700, 1))
        return Task(model=model, train_data=data, val_data=data, loss_sums=loss_sums)


def trained(world, folder, **profile):
    recipe = Wide(
        train=TrainConfig(steps=4, global_batch_size=4 * world.size),
        checkpoint=CheckpointConfig(every=None),
        profile=ProfileConfig(**profile),
    )
    run, log = RunDirectory(folder), Lines()
    if world.rank == 0:
        folder.mkdir()
    world.barrier("folder")
    task = recipe.build(log.say)
    fit(settle(task, recipe, world, run, log))
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}, log.said


@pytest.mark.ranks(2)
def test_the_ranks_of_a_timeline(world, shared_dir):
    plain, _ = trained(world, shared_dir / "plain")
    weights, said = trained(world, shared_dir / "run", timeline="2:3", ranks="all")
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    assert "start_all_reduce_" not in vars(world)
    if world.rank != 0:
        return
    trace = json.loads((shared_dir / "run" / "timeline.json").read_text())
    assert faults_of(trace) == []
    of_ranks = {rank: [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == rank] for rank in (0, 1)}
    for events in of_ranks.values():
        assert [e["args"]["step"] for e in events if e["cat"] == "hvdtrain.step"] == [2, 3]
        assert sum(e["cat"] == "cpu_op" for e in events) > 50
        assert {"forward", "backward", "update"} <= {e["name"] for e in events if e["cat"] == "hvdtrain.phase"}
    collectives = [
        [e for e in events if e["cat"] == "hvdtrain.collective" and e["name"].startswith("gradients")]
        for events in of_ranks.values()
    ]
    assert [e["name"] for e in collectives[0]] == [e["name"] for e in collectives[1]]
    assert len(collectives[0]) >= 4, "two buckets in each of two steps"
    slack = 2 * max(trace["otherData"]["clock_uncertainties_us"].values()) + 1000
    for mine, theirs in zip(*collectives, strict=True):  # nobody has a result before all have given their part
        assert mine["ts"] <= theirs["ts"] + theirs["dur"] + slack
        assert theirs["ts"] <= mine["ts"] + mine["dur"] + slack
    assert sum("a step of" in line for line in said) == 2
    assert any("communication was under way" in line for line in said)


@pytest.mark.ranks(2)
def test_clocks_of_one_host_are_one(world):
    offsets = clock_offsets(world)
    assert len(offsets) == world.size
    assert all(abs(offset.ns) <= offset.uncertainty_ns for offset in offsets)


@pytest.mark.ranks(2)
def test_a_rank_that_is_not_there(world, shared_dir):
    with pytest.raises(ConfigError, match=f"the ranks are 0 to {world.size - 1}"):
        trained(world, shared_dir / "none", timeline="2:3", ranks="0,7")
