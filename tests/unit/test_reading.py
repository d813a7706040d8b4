"""Batches that are read ahead are those that would have been read anyway."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from hvdtrain.process.launch import Launch
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import Config, TrainConfig
from hvdtrain.trainer import Task, settle
from hvdtrain.trainer.reading import BatchReader
from hvdtrain.world import SoloWorld


class Numbers:
    """Sample i is the number i; notes who reads."""

    reads_ahead = True

    def __init__(self, bad=()):
        self.bad = bad
        self.threads = []

    def __len__(self):
        return 21

    def batch(self, indices):
        self.threads.append(threading.current_thread().name)
        if any(int(i) in self.bad for i in indices):
            raise OSError("sample cannot be read")
        return (indices.clone(),)

    def num_targets(self, indices):
        return len(indices)


class Others(Numbers):
    """Reads in its own way, and has not said that another thread may do it."""

    def batch(self, indices):
        return super().batch(indices)


def job_of(data):
    task = Task(model=nn.Linear(1, 1), train_data=data, val_data=data, loss_sums=lambda model, batch: {})
    config = Config(train=TrainConfig(steps=9, global_batch_size=8, micro_batch_size=2))
    return settle(task, config, SoloWorld(torch.device("cpu"), Launch("none")), Path("none"), MetricLog(None, []))


def read(job, steps):
    reader, seen = BatchReader(job, in_step=False), []
    for step in steps:
        batches = job.order.micro_batches(step, 0)
        for place in range(len(batches)):
            (tokens,) = reader.read(step, place, len(batches) - 1)
            assert tokens.tolist() == job.order.global_batch(step)[batches[place]].tolist()
            seen.append(tokens.tolist())
    return seen


def test_what_is_read_ahead_is_what_is_asked_for():
    ahead, plain = Numbers(), Others()
    steps = [*range(7), 0, 1, 5]  # over the ends of epochs, with short batches, and not always the next step
    assert read(job_of(ahead), steps) == read(job_of(plain), steps)
    assert "hvdtrain-data" in ahead.threads
    assert set(plain.threads) == {threading.main_thread().name}


def test_an_error_comes_where_the_batch_is_asked_for():
    job = job_of(Numbers())
    bad = int(job.order.global_batch(1)[job.order.micro_batches(1, 0)[0]][0])
    job.task.train_data.bad = (bad,)
    assert len(read(job, [0])) == 4  # the thread has met it by then
    with pytest.raises(OSError, match="sample cannot be read"):
        read(job, [0, 1])
