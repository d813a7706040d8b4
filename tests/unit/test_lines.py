"""Lines of metrics of ranks that train apart: no step waits for one, and each says what it would have said at once."""

import pytest
import torch
from test_components import Lines
from thread_world import run_ranks
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.settings import CheckpointConfig, CommConfig, Config, EvalConfig, LogConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import Task, fit, settle
from hvdtrain.trainer.local_updates import LocalUpdates
from hvdtrain.world import asking

STEPS = 24


def losses(model, batch):
    return {"loss": (model(batch[0]) - batch[1]).square().sum()}


class Journal(Lines):
    """Notes how far training was when each line was written."""

    training = None

    def write(self, step, metrics, event=None):
        super().write(step, metrics, event)
        self.written.append((step, self.now))

    def advance(self, step):
        self.now = step

    def __init__(self):
        super().__init__()
        self.written, self.now = [], 0


def run(world, folder, every=3, **comm):
    x = torch.randn(48, 5, generator=torch.Generator().manual_seed(3))
    data = TensorSamples(x, x.sin().sum(1, keepdim=True))
    model = nn.Linear(5, 1)
    nn.init.constant_(model.weight, 0.1)
    nn.init.zeros_(model.bias)
    config = Config(
        train=TrainConfig(steps=STEPS, global_batch_size=8),
        optim=OptimConfig(peak_lr=0.01, schedule="linear"),
        comm=CommConfig(sync="local", period=6, **comm),
        log=LogConfig(every=every),
        eval=EvalConfig(every=10),
        checkpoint=CheckpointConfig(every=7),
    )
    task = Task(model=model, train_data=data, val_data=data, loss_sums=losses)
    log = Journal()
    fit(settle(task, config, world, RunDirectory(folder), log))
    return log, list(world.sent)


def told(log):
    kinds = ("train/loss", "train/lr", "train/grad_norm", "val/loss", "train/epoch")
    return [(step, {name: line[name] for name in kinds if name in line}) for step, line in log.lines]


@pytest.mark.parametrize(("every", "comm"), [(1, {}), (3, {}), (3, {"fragments": 2, "overlap_steps": 4})])
def test_a_late_line_says_what_it_would_have_said_at_once(tmp_path, monkeypatch, every, comm):
    monkeypatch.setattr(LocalUpdates, "busy_until", lambda self, training: 0)
    monkeypatch.setattr(asking, "wanted_steps", lambda *given: 1)
    at_once = run_ranks(2, lambda world: run(world, tmp_path / "now", every, **comm))
    monkeypatch.undo()
    monkeypatch.setattr(asking, "wanted_steps", lambda *given: 5)
    late = run_ranks(2, lambda world: run(world, tmp_path / "late", every, **comm))
    for (now, _), (then, _) in zip(at_once, late, strict=True):
        assert told(then) == told(now)
    assert {step for step, _ in told(late[0][0])} >= {*range(every, STEPS + 1, every), 10, 20}
    assert any(now > step for step, now in late[0][0].written) == (every > 1)


def test_a_line_is_one_message(tmp_path):
    _, sent = run_ranks(2, lambda world: run(world, tmp_path / "run"))[0]
    last = len(sent) - sent[::-1].index("train.metrics") - 1
    first = sent.index("train.metrics")
    between = {name.split(".")[0] for name in sent[first:last]}
    assert "skipped" not in between
    assert sent.count("train.metrics") == len({*range(3, STEPS + 1, 3)})


def test_lines_by_seconds_need_no_message_of_their_own(tmp_path):
    log, sent = run_ranks(2, lambda world: run(world, tmp_path / "run", every="1s"))[0]
    assert not [name for name in sent if name.startswith("log.")]
    assert [step for step, line in log.lines if "train/loss" in line][-1] == STEPS
