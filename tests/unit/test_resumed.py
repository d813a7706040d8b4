"""What is said when a run goes on, and which of its weights are the best."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from hvdtrain import CheckpointConfig, Config, EvalConfig, OptimConfig, Task, TensorSamples, TrainConfig
from hvdtrain.errors import ResumeError
from hvdtrain.optim.schedule import learning_rate
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.rundir.manifest import Manifest
from hvdtrain.settings import to_dict
from hvdtrain.trainer import fit, settle
from hvdtrain.trainer.component import Component
from hvdtrain.trainer.fits import check_fits
from hvdtrain.trainer.resumed import resume_lines
from hvdtrain.world import SoloWorld

SOLO = SoloWorld(torch.device("cpu"), Launch("none"))


def job_of(run_dir, said, *, steps=8, components=(), **settings):
    torch.manual_seed(0)
    x = torch.randn(16, 3)
    data = TensorSamples(x, x.sum(1, keepdim=True))
    task = Task(
        model=torch.nn.Linear(3, 1),
        train_data=data,
        val_data=data,
        loss_sums=lambda model, batch: {"loss": F.mse_loss(model(batch[0]), batch[1], reduction="sum")},
        components=components,
    )
    config = Config(train=TrainConfig(steps=steps, global_batch_size=4), **settings)
    log = MetricLog(None, [])
    log.say = said.append
    return settle(task, config, SOLO, RunDirectory(run_dir), log)


def test_the_start_says_from_where_and_that_the_rate_jumps(tmp_path):
    said = []
    fit(job_of(tmp_path, said, steps=8))
    assert not any("continues" in line for line in said)
    fit(job_of(tmp_path, said, steps=12))
    assert f"continues at step 8 of 12, from {tmp_path}/checkpoints/step-00000008" in said
    jump = next(line for line in said if "jumps" in line)
    then, now = learning_rate(OptimConfig(), 8, 8), learning_rate(OptimConfig(), 8, 12)
    assert "was to have 8 steps and has 12 now: with the schedule cosine" in jump
    assert f"jumps from {then:.3g} to {now:.3g}." in jump


def test_the_way_out_that_is_named_keeps_the_rate(tmp_path):
    job = job_of(tmp_path, [], steps=12, optim=OptimConfig(warmup_steps=2))
    *_, warning = resume_lines(job, 8, 8)
    rate = float(warning.split("--optim.peak-lr ")[1].split()[0])
    kept = OptimConfig(schedule="constant", warmup_steps=0, peak_lr=rate)
    assert learning_rate(kept, 8, 12) == pytest.approx(learning_rate(job.config.optim, 8, 8), rel=1e-5)


def test_nothing_jumps_without_a_reason(tmp_path):
    assert len([*resume_lines(job_of(tmp_path, [], optim=OptimConfig(schedule="constant"), steps=12), 8, 8)]) == 1
    assert len([*resume_lines(job_of(tmp_path, [], steps=8), 4, 8)]) == 1
    assert len([*resume_lines(job_of(tmp_path, [], steps=8), 4, None)]) == 1


def test_best_counts_an_evaluation_that_no_save_was_due_for(tmp_path):
    settings = {"eval": EvalConfig(every=2), "checkpoint": CheckpointConfig(every=5, keep_last=1)}
    job = job_of(tmp_path, [], steps=9, optim=OptimConfig(peak_lr=10.0, schedule="constant"), **settings)
    losses = {}
    job.log.write = lambda step, metrics, event=None: losses.update(
        {step: metrics["val/loss"]} if "val/loss" in metrics else {}
    )
    fit(job)
    best = min(losses, key=losses.get)
    assert best not in (5, 9), losses
    named = (tmp_path / "checkpoints" / "best").read_text().strip()
    assert named == f"step-{best:08d}"
    manifest = json.loads((tmp_path / "checkpoints" / named / "manifest.json").read_text())
    assert manifest["val_loss"] == losses[best]


class Counter(Component):
    """Counts updates."""

    name = "counter"

    def __init__(self, job):
        self.count = 0

    def after_update(self, training, step):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_a_component_of_the_recipes_own_is_saved_and_restored(tmp_path):
    made = []

    def build(job):
        made.append(Counter(job))
        return made[-1]

    fit(job_of(tmp_path, [], steps=3, components=(build,)))
    fit(job_of(tmp_path, [], steps=5, components=(build,)))
    assert [counter.count for counter in made] == [3, 5]


@pytest.mark.parametrize("batch", [{"global_batch_size": 16}, {"micro_batch_size": 8}])
def test_a_run_that_has_changed_its_ranks_keeps_its_batch_when_it_goes_on_again(tmp_path, batch):
    """Begun on two ranks, gone on with one: the manifest of that one leads to the same batch as that of the two."""
    job = job_of(tmp_path, [])
    config = Config(train=TrainConfig(steps=8, **batch))
    for ranks in (2, 1):
        before = Manifest(step=1, samples=16, world_size=ranks, global_batch_size=16, micro_batch_size=8)
        plan = settle(job.task, config, SOLO, job.directory, job.log, before=before).plan
        assert (plan.global_batch_size, plan.micro_batch_size, plan.accum_steps) == (16, 8, 2)


def test_a_setting_that_came_later_is_at_its_default(tmp_path):
    """A run begun by an earlier version goes on, unless the new setting is given another value."""
    job = job_of(tmp_path, [])
    then = to_dict(job.config)
    del then["optim"]["decay_factor"], then["optim"]["milestones"]
    state = {"config": then, "global_batch_size": job.plan.global_batch_size, "fingerprint": "", "data": {}}
    check_fits(job, state, {})
    optim = dataclasses.replace(job.config.optim, decay_factor=0.5)
    changed = dataclasses.replace(job, config=dataclasses.replace(job.config, optim=optim))
    with pytest.raises(ResumeError, match=r"optim\.decay_factor was 0\.1 and is 0\.5 now\. Go on"):
        check_fits(changed, state, {})


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_run_of_another_recipe_is_called_that(tmp_path, count):
    """It was a list of all settings of both, each of which "is None now"."""
    job = job_of(tmp_path, [])
    then = to_dict(job.config)
    then["model"] = {**then.get("model", {}), **{f"width_{number:02}": 3 for number in range(count)}}
    state = {"config": then, "global_batch_size": job.plan.global_batch_size, "fingerprint": "", "data": {}}
    with pytest.raises(
        ResumeError, match=r"is a run of another recipe, or .* \(model\.width_00.*: choose another"
    ) as said:
        check_fits(job, state, {})
    assert ("and 35 more)" in str(said.value)) == (count == 40)
    assert "None" not in str(said.value)
    sgd = dataclasses.replace(job, config=dataclasses.replace(job.config, optim=SgdConfig()))
    with pytest.raises(ResumeError, match=r"optim\.name was adamw and is sgd now"):
        check_fits(sgd, {**state, "config": to_dict(job.config)}, {})
