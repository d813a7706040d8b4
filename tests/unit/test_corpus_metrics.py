"""Figures of a whole held-out set: answers of all ranks, each sample once and in order. And order by length."""

import dataclasses

import numpy as np
import pytest
import torch
from test_components import job_of
from thread_world import run_ranks

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.data.order import SampleOrder
from hvdtrain.data.samplers import ByLength, check_sampler
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.settings import BatchPlan
from hvdtrain.trainer import CorpusEvaluation, evaluate
from hvdtrain.trainer.state import start_training


def with_answers(job, answers, score, metrics=("first",)):
    data = TensorSamples(torch.arange(7.0).unsqueeze(1))
    part = CorpusEvaluation(data=data, answers=answers, score=score, metrics=metrics)
    return dataclasses.replace(job, task=dataclasses.replace(job.task, evaluations=(part,)))


def said(model, batch):
    assert not model.training
    assert not torch.is_grad_enabled()
    return [f"sample {int(row)}" for row in batch[0]]


def test_each_answer_once_and_in_order(tmp_path):
    seen = []

    def score(answers):
        seen.append(answers)
        return {"first": 41.5}

    job = with_answers(job_of(tmp_path), said, score)
    found = evaluate(job, start_training(job))
    assert found["val/first"] == 41.5
    assert "val/loss" in found
    assert seen == [[f"sample {i}" for i in range(7)]]


def test_wrong_answers_are_told(tmp_path):
    job = job_of(tmp_path)
    few = with_answers(job, lambda model, batch: ["one"], lambda answers: {"first": 1.0})
    with pytest.raises(ConfigError, match="returned 1 answers to"):
        evaluate(few, start_training(few))
    other = with_answers(job, said, lambda answers: {"second": 1.0})
    with pytest.raises(ConfigError, match="returned the figures second, and metrics= names first"):
        evaluate(other, start_training(other))


def test_answers_of_three_ranks_are_those_of_one(tmp_path):
    def work(world):
        scored = []

        def score(answers):
            scored.append(answers)
            return {"first": float(len(answers))}

        job = dataclasses.replace(job_of(tmp_path / str(world.rank)), world=world)
        job = with_answers(job, said, score)
        return evaluate(job, start_training(job))["val/first"], scored

    found = run_ranks(3, work)
    assert [figure for figure, _ in found] == [7.0, 7.0, 7.0]
    assert [scored for _, scored in found] == [[[f"sample {i}" for i in range(7)]], [], []]


def lengths_of(count):
    return np.random.default_rng(0).integers(1, 100, count)


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
def test_by_length_visits_each_sample_once_an_epoch_in_another_order(count):
    sampler = ByLength(lengths_of(count), 8, pool=4)
    epochs = [sampler.samples(np.arange(count), count, 3, epoch).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 64 or len({tuple(epoch) for epoch in epochs}) == 3
    again = sampler.samples(np.arange(count)[::-1], count, 3, 1).tolist()
    assert again == epochs[1][::-1]


def test_by_length_pads_less_and_mixes_long_with_short():
    lengths = lengths_of(4096)
    order = SampleOrder(4096, BatchPlan(32, 32, 1, 1), 0, ByLength(lengths, 32))
    batches = [lengths[order.global_batch(step).numpy()] for step in range(order.steps_per_epoch)]
    padded = sum(len(batch) * batch.max() for batch in batches) / lengths.sum()
    shuffled = [
        lengths[SampleOrder(4096, BatchPlan(32, 32, 1, 1), 0).global_batch(step).numpy()] for step in range(128)
    ]
    assert padded < 1.05
    assert sum(len(batch) * batch.max() for batch in shuffled) / lengths.sum() > 1.5
    means = [batch.mean() for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_there_is_a_length_for_each_sample():
    check_sampler(ByLength([1, 2, 3], 2), 3)
    with pytest.raises(DataError, match="3 lengths for 4 samples"):
        check_sampler(ByLength([1, 2, 3], 2), 4)
