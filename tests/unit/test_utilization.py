"""MFU: operations are counted without computing, as `bench` counts them, and held against the peak of all ranks."""

import dataclasses

import pytest
import torch
from test_memory import DECODER
from test_memory import job_of as decoder_job
from thread_world import run_ranks
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.models.decoder import Decoder
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.rundir.sinks import describe
from hvdtrain.settings import Config, LogConfig, ModelConfig, TrainConfig
from hvdtrain.trainer import Task, settle, train_step
from hvdtrain.trainer.flops import flops_per_step, with_flops
from hvdtrain.trainer.line import step_metrics
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.stopwatch import Stopwatch
from hvdtrain.trainer.utilization import METRIC, Utilization
from hvdtrain.world import SoloWorld

PEAK = LogConfig(peak_tflops=2e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-true", "fp64"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_operations_are_those_that_are_computed(precision, checkpoints):
    model = Decoder(DECODER, 50)
    settings = ModelConfig(checkpoint_blocks=checkpoints)
    job = decoder_job(
        model, log=PEAK, model=settings, train=TrainConfig(steps=3, global_batch_size=4, precision=precision)
    )
    before = torch.get_rng_state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counted = with_flops(job)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())
    training = start_training(dataclasses.replace(job, directory=None))
    assert counted.flops_per_target * 4 == flops_per_step(job, training)


def regression(world, folder, loss_sums, log=PEAK):
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    data = TensorSamples(x, x.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    task = Task(model=model, train_data=data, val_data=data, loss_sums=loss_sums)
    config = Config(train=TrainConfig(steps=4, global_batch_size=4), log=log)
    return settle(task, config, world, RunDirectory(folder), MetricLog(None, []))


def square(model, batch):
    return {"loss": (model(batch[0]) - batch[1]).square().sum()}


def solo():
    from hvdtrain.process.launch import Launch

    return SoloWorld(torch.device("cpu"), Launch("none"))


def logged(job):
    training = start_training(job)
    watch = Stopwatch(0)
    for _ in range(3):
        train_step(job, training)
    return training, step_metrics(job, training, watch)


def test_it_is_the_share_of_the_peak_of_all_ranks(tmp_path):
    def work(world):
        training, metrics = logged(with_flops(regression(world, tmp_path, square)))
        # 3 passes of 2 operations a weight of the two layers, a sample.
        expected = 3 * 2 * (8 * 16 + 16) * 4 / training.figures.step_s / (2e9 * world.size)
        return metrics[METRIC] / expected, training.component(Utilization).about

    for share, about in (*run_ranks(2, work), work(solo())):
        assert share == pytest.approx(1)
        assert about == "MFU:        of 0.002 TFLOP/s a rank (--log.peak-tflops)"


def test_without_a_peak_there_is_none(tmp_path):
    job = with_flops(regression(solo(), tmp_path, square, LogConfig()))
    assert job.flops_per_target is None
    training, metrics = logged(job)
    assert training.component(Utilization) is None
    assert METRIC not in metrics


def test_a_model_that_cannot_be_counted_is_said_and_trains(tmp_path):
    def by_value(model, batch):
        loss = square(model, batch)["loss"]
        return {"loss": loss * (1.0 if loss.item() >= 0 else 2.0)}

    training, metrics = logged(with_flops(regression(solo(), tmp_path, by_value)))
    assert "not logged" in training.component(Utilization).about
    assert METRIC not in metrics


def test_a_person_reads_a_share():
    assert describe({METRIC: 0.4123, "throughput/tokens_per_s": 1234.0}) == "MFU 41.2%  1,234 tokens/s"
