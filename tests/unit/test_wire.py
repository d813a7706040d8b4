"""The wire format of a training: on another number of ranks, on one, counted, and what a dry run says of it."""

import dataclasses

import pytest
import torch
from test_components import job_of as any_job_of
from thread_world import run_ranks

from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CommConfig
from hvdtrain.trainer import settle, train_step
from hvdtrain.trainer.memory import estimate, wire_bytes
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.wire import Traffic
from hvdtrain.world import SoloWorld


class Lines(MetricLog):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(None, [])
        self.said = []

    def say(self, text):
        self.said.append(text)


def job_on(world, folder, **comm):
    """Return a small job on this world, with a directory and a log of its own."""
    job = any_job_of(folder)
    if comm["compression"] not in ("none", "fp16"):
        comm["compression_min_size"] = 8
    train = dataclasses.replace(job.config.train, micro_batch_size=None)
    config = dataclasses.replace(job.config, comm=CommConfig(**comm), train=train)
    return settle(job.task, config, world, RunDirectory(folder), Lines())


def trained(world, folder, compression, steps):
    """Return the job, the training and what the ranks' codecs remember, after some steps and a save."""
    job = job_on(world, folder, compression=compression)
    training = start_training(job)
    for _ in range(steps):
        train_step(job, training)
    with Saver(job) as saver:
        saver.save(training, {})
        saver.finish()
    codec = training.optimizer.codec
    return job, training, {} if codec is None else {name: kept.clone() for name, kept in codec.left_over().items()}


@pytest.mark.parametrize("compression", ["topk:0.3", "int8"])
def test_another_number_of_ranks_goes_on_with_the_sum_of_what_is_left(tmp_path, compression):
    """From two ranks to four, to one, and back to two: one rank sends nothing, and what is left over is dropped."""
    before = [kept for _, _, kept in run_ranks(2, lambda world: trained(world, tmp_path, compression, 2))]
    total = {name: sum(kept[name] for kept in before) for name in before[0]}
    assert all(tensor.any() for tensor in total.values())

    of_four = run_ranks(4, lambda world: trained(world, tmp_path, compression, 0))
    for name, tensor in total.items():
        assert torch.allclose(sum(kept[name] for _, _, kept in of_four), tensor, rtol=1e-5, atol=1e-8)
        assert all(torch.equal(kept[name], of_four[0][2][name]) for _, _, kept in of_four)
    (line,) = [line for line in of_four[0][0].log.said if "still to send" in line]
    assert "2 ranks" in line
    assert "4 go on: each with an equal part of the sum" in line
    assert "--comm.compression" not in line  # they may go on by another one

    ((job, _, _),) = run_ranks(1, lambda world: trained(world, tmp_path, compression, 1))
    assert any("one rank sends nothing, and it is dropped" in line for line in job.log.said)
    again = run_ranks(2, lambda world: trained(world, tmp_path, compression, 0))
    assert [kept for _, _, kept in again] == [{}, {}]
    assert not any("still to send" in line for line in again[0][0].log.said)


def test_bytes_of_a_step_are_counted(tmp_path):
    def work(world):
        found = {}
        for compression in ("none", "fp16", "topk:0.3", "int8"):
            job, training, _ = trained(world, tmp_path / compression.replace(":", ""), compression, 3)
            traffic = training.component(Traffic)
            said = wire_bytes(job)
            found[compression] = traffic.metrics(training)["comm/bytes_per_step"], said
            assert traffic.metrics(training) == {}
        return found

    for compression, (counted, said) in run_ranks(2, work)[0].items():
        shares = 6 * (2 if compression == "fp16" else 4)  # of six parameters: who has a gradient
        assert counted == said + shares


def test_what_is_remembered_needs_memory(tmp_path):
    def work(world):
        needed = {}
        for compression in ("none", "int8"):
            job = job_on(world, tmp_path / compression, compression=compression)
            needed[compression] = estimate(job).gradients - wire_bytes(job)
        return needed, sum(parameter.numel() for parameter in job.task.model.parameters() if parameter.numel() >= 8)

    for needed, numbers in run_ranks(2, work):
        assert needed["int8"] - needed["none"] == 3 * 4 * numbers


def test_one_rank_counts_nothing(tmp_path):
    job = any_job_of(tmp_path)
    assert isinstance(job.world, SoloWorld)
    assert Traffic.of(job) is None
