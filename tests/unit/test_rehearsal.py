"""A rehearsal trains as a run does, and leaves nothing behind."""

import pytest
import torch
from test_components import SOLO, job_of

from hvdtrain.errors import ConfigError
from hvdtrain.settings import BatchPlan
from hvdtrain.trainer import Recipe, train_step
from hvdtrain.trainer.rehearsal import FullBatches, rehearse
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.task import build_task


def test_its_steps_are_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = job_of(tmp_path / "run")
    start = {name: tensor.clone() for name, tensor in real.task.model.state_dict().items()}
    job = rehearse(real.task, real.config, SOLO, num_steps=real.num_steps)
    rehearsed = start_training(job)
    for _ in range(7):  # over the end of an epoch
        train_step(job, rehearsed)
    assert all(tensor.equal(start[name]) for name, tensor in real.task.model.state_dict().items())
    training = start_training(real)
    for _ in range(7):
        train_step(real, training)
    pairs = zip(rehearsed.model.state_dict().values(), training.model.state_dict().values(), strict=True)
    assert all(a.equal(b) for a, b in pairs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [lambda: torch.empty(1 << 55), lambda: bytearray(1 << 60)])
def test_what_takes_more_memory_than_there_is_is_a_sentence(how):
    """As a dry run of a model with a matrix of a million by a million."""

    class Huge(Recipe):
        def build(self, say):
            return how()

    with pytest.raises(ConfigError, match="takes more memory than there is"):
        build_task(Huge(), print)


def test_it_cannot_be_saved(tmp_path):
    real = job_of(tmp_path)
    job = rehearse(real.task, real.config, SOLO)
    with pytest.raises(ValueError, match="a rehearsal has no directory"), Saver(job) as saver:
        saver.save(start_training(job), {})


def test_full_batches_only():
    """22 samples in batches of 4 are 5 full ones; the short sixth never comes."""
    order = FullBatches(22, BatchPlan(4, 2, 1, 2), seed=1)
    batches = [order.global_batch(step) for step in range(11)]
    assert {len(batch) for batch in batches} == {4}
    assert batches[5].equal(batches[0])
    assert batches[10].equal(batches[0])
    assert len(torch.cat(batches[:5]).unique()) == 20
    assert [len(part) for rank in (0, 1) for part in order.micro_batches(5, rank)] == [2, 2]
