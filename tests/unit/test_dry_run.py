"""A dry run says what the run says before its first step, and refuses what that refuses, in the same words."""

import dataclasses
import os
import threading
import time
from contextlib import closing

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError, ResumeError
from hvdtrain.recipes.given import apply, in_sections
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import OptimConfig, TrainConfig
from hvdtrain.settings.values import Source
from hvdtrain.trainer import Recipe, Task, settle
from hvdtrain.trainer.announced import would_announce
from hvdtrain.trainer.fakes import without_storage
from hvdtrain.trainer.memory import checked_estimate
from hvdtrain.trainer.state import start_training
from hvdtrain.verbs import train
from hvdtrain.verbs.train import Request, run
from hvdtrain.world import Heartbeat


class Named(nn.Linear):
    """A layer that adds something of its own to what is saved."""

    def get_extra_state(self):
        return {"about": "this"}


class Coupled(torch.optim.SGD):
    """Each parameter moves by what all others are."""

    def step(self, closure=None):
        total = sum(p.detach().sum() for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(total, alpha=-group["lr"])


def plain():
    return nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 1))


def groups_of(optim, model):
    first, last = model[0], model[2]
    groups = [{"params": first.parameters(), "lr": 0.1 * optim.peak_lr}, {"params": last.parameters()}]
    return torch.optim.AdamW(groups, lr=optim.peak_lr)


MODELS = {
    "plain": plain,
    "in eval mode": lambda: plain().eval(),
    "sparse": lambda: nn.Sequential(nn.Embedding(4, 1, sparse=True)),
    "with more than weights": lambda: nn.Sequential(Named(3, 1)),
}
BUILD = {
    "in groups": groups_of,
    "coupled": lambda optim, model: Coupled(model.parameters(), lr=optim.peak_lr),
    "at another rate": lambda optim, model: torch.optim.AdamW(model.parameters(), lr=7.0),
    "none": lambda optim, model: model,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(Recipe):
    """A regression, whose parts can be other ones."""

    kind: str = "plain"
    """Which model."""
    built: str = ""
    """Which optimizer, where it is none of hvdtrain's."""

    def build(self, say):
        x = torch.linspace(-1, 1, 60).view(20, 3)
        own = {"build_optimizer": BUILD[self.built]} if self.built else {}
        data = TensorSamples(x, x.sum(1, keepdim=True))
        model = MODELS[self.kind]()

        def loss_sums(model, batch):
            return {"loss": (model(batch[0]) - batch[1]).square().sum()}

        return Task(model=model, train_data=data, val_data=data, loss_sums=loss_sums, **own)


def recipe(**settings):
    made = Small(train=TrainConfig(steps=8, global_batch_size=4), optim=OptimConfig(name="adamw", peak_lr=0.01))
    return apply(made, [(in_sections(settings, made), Source("the test"))])


APART = {"sync": "local", "period": 4}
UNKNOWN = {"compression": "int8", "compression_exact": "nothing*"}
REFUSED = {
    "names that are not there": {"comm": UNKNOWN},
    "names that are not there, of updates": {"comm": UNKNOWN | APART},
    "directions of what is approximate": {"comm": {"op": "adasum", "compression": "int8"}},
    "parts of directions": {"comm": {"op": "adasum"}, "optim": {"shard": True}},
    "parts of what is not one sum": {"comm": {"compression": "bf16"}, "optim": {"shard": True}},
    "parts of sparse gradients": {"kind": "sparse", "optim": {"shard": True, "name": "sgd"}},
    "directions of sparse gradients": {"kind": "sparse", "comm": {"op": "adasum"}, "optim": {"name": "sgd"}},
    "norms of what is approximate": {"comm": {"compression": "int8"}, "health": {"noise_scale": True}},
    "steps after the last": {"profile": {"timeline": "50:60"}},
    "ranks that are not there": {"profile": {"timeline": "1:2", "ranks": "7"}},
    "a schedule without evaluations": {"optim": {"schedule": "plateau"}},
    "an average of more than weights": {"kind": "with more than weights", "train": {"ema": 0.9}},
    "statistics that are not there": {"model": {"sync_batch_norm": True}},
    "blocks that are not there": {"model": {"checkpoint_blocks": True}},
    "blocks to be compiled that are not there": {"model": {"compile": "blocks"}},
    "an optimizer that has no parts": {"built": "coupled", "optim": {"shard": True}},
    "an optimizer with a rate that is never used": {"built": "at another rate"},
    "no optimizer": {"built": "none"},
}


# What no number of ranks above one can do; a run may grow to as many.
NEVER = {
    "an average of what differs": {"comm": APART, "train": {"ema": 0.9}},
    "parts of what differs": {"comm": APART, "optim": {"shard": True}},
    "a scale of what differs": {"comm": APART, "train": {"precision": "fp16"}},
    "norms of what differs": {"comm": APART, "log": {"grad_norms": True}},
    "noise of what differs": {"comm": APART, "health": {"noise_scale": True}},
    "leaving out what others do not": {"comm": APART, "health": {"spikes": "skip"}},
    "directions of what differs": {"comm": APART | {"op": "adasum"}},
    "statistics of what differs": {"comm": APART, "model": {"sync_batch_norm": True}},
    "scales of what is left over": {"comm": {"compression": "int8"}, "train": {"precision": "fp16"}},
    **{name: REFUSED[name] for name in ("parts of directions", "parts of what is not one sum")},
    "directions of what is approximate": REFUSED["directions of what is approximate"],
}


@pytest.mark.parametrize("given", NEVER.values(), ids=NEVER.keys())
def test_settings_that_do_not_go_together_are_refused_on_one_rank_as_on_two(tmp_path, given):
    """A supervised run that began on one host ended with exit code 2 when a second one came."""
    config = recipe(**given)

    def begun(world):
        def settled():
            start_training(settle(config.build(print), config, world, RunDirectory(tmp_path), MetricLog(None, [])))

        with pytest.raises(ConfigError) as caught:
            settled()
        return str(caught.value)

    assert len({*run_ranks(1, begun), *run_ranks(2, begun)}) == 1


@pytest.mark.parametrize("given", REFUSED.values(), ids=REFUSED.keys())
def test_what_a_run_refuses_a_dry_run_refuses(tmp_path, given):
    """On all ranks alike, so that it is one message."""

    config = recipe(**given)

    def settled(world, task):
        directory = RunDirectory(tmp_path)
        return world.together(lambda: settle(task, config, world, directory, MetricLog(None, [])), "settle")

    def begun(world):
        return refusal(lambda: start_training(settled(world, config.build(print))))

    with without_storage():  # of this process, not of a thread
        tasks = [config.build(print) for _ in range(2)]

    def dry(world):
        def looked_at():
            job = settled(world, tasks[world.rank])
            world.together(lambda: (checked_estimate(job), would_announce(job)), "dry")

        return refusal(looked_at)

    refused = run_ranks(2, begun)
    assert refused[0] == refused[1]
    assert run_ranks(2, dry) == refused
    assert refused[0][1]
    assert not refused[0][0].startswith("on rank")


def refusal(work):
    with pytest.raises(ConfigError) as caught:
        work()
    return str(caught.value), caught.value.is_on_all_ranks


@pytest.fixture
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


def said(capsys, tmp_path, is_dry, **given):
    capsys.readouterr()
    run(Request("small", recipe(**given), tmp_path / "run", is_dry), leaves=False)
    return capsys.readouterr().out.splitlines()


def test_it_says_what_the_run_says_before_its_first_step(tmp_path, capsys, environment):
    """Each line with a name before a colon, those of parts that have something to say among them; and what is next."""
    given = {
        "train": {"ema": 0.9, "steps": 6},
        "eval": {"every": 2, "patience": 5},
        "profile": {"timeline": "2:3"},
        "log": {"peak_tflops": 1.0},
        "health": {"noise_scale": True},
        "kind": "in eval mode",
        "built": "in groups",
    }
    dry = said(capsys, tmp_path, True, **given)
    assert not (tmp_path / "run").exists()
    trained = said(capsys, tmp_path, False, **given)
    head = [
        line for line in trained[: next(i for i, line in enumerate(trained) if line.split()[:1] == ["step"])] if line
    ]
    assert len(head) > 12
    assert [line for line in dry if line in head] == head
    expected = {"average:", "patience:", "profile:", "MFU:", "rates:", "modes:", "--health.noise-scale"}
    assert expected <= {line.split()[0] for line in head}
    # What a run does not say.
    assert "held out:   20 samples, evaluated after every 2 steps and the last, 3 times" in dry
    given["train"]["steps"] = 9
    again = said(capsys, tmp_path, True, **given)
    at = f"from {tmp_path / 'run' / 'checkpoints' / 'step-00000006'}"
    assert any(line.startswith("continues at step 6 of 9") and line.endswith(at) for line in again)
    with pytest.raises(ResumeError, match=r"optim\.peak_lr was 0\.01 and is 0\.5 now"):
        said(capsys, tmp_path, True, **given, optim={"peak_lr": 0.5})


def test_a_refused_runs_directory_goes_when_every_rank_has_closed_its_log(tmp_path, monkeypatch, environment):
    """The last of them found none to write the reason to, and said so beside it."""
    folder, close, closed, ranks = tmp_path / "run", train.close_rank_log, [], {}

    def late(handler):
        if ranks[threading.get_ident()] == 1:
            time.sleep(0.5)
            closed.append(folder.exists())
        close(handler)

    monkeypatch.setattr(train, "close_rank_log", late)
    config = recipe(**REFUSED["names that are not there"])

    def work(world):
        ranks[threading.get_ident()] = world.rank
        heartbeat = Heartbeat(world, 60)  # never started: it would end this process, which is all ranks
        with closing(heartbeat._waker), closing(heartbeat._wakeful):
            return refusal(lambda: train._run(Request("small", config, folder), world, heartbeat, []))

    one, other = run_ranks(2, work)
    assert one == other
    assert closed == [True]
    assert not folder.exists()
