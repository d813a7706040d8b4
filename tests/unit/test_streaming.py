"""Local updates in fragments that arrive late: the paper's algorithm written out, and exact through saves."""

import copy
import dataclasses
import itertools

import pytest
import torch
from thread_world import run_ranks
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CheckpointConfig, CommConfig, Config, EvalConfig, HealthConfig, TrainConfig
from hvdtrain.trainer import Task, fit, settle, train_step
from hvdtrain.trainer.evaluation import evaluate
from hvdtrain.trainer.fragments import Schedule, in_fragments
from hvdtrain.trainer.outer_updates import OuterUpdates
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.ways import why_refused

STEPS, LR = 14, 0.05
STREAMED = {"period": 5, "fragments": 2, "overlap_steps": 3, "overlap_mix": 0.25}


torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 1))


def losses(model, batch):
    return {"loss": (model(batch[0]) - batch[1]).square().sum()}


def job_of(world, folder, **comm):
    x = torch.randn(44, 5, generator=torch.Generator().manual_seed(3)).double()
    data = TensorSamples(x, x.sin().sum(1, keepdim=True))
    config = Config(
        train=TrainConfig(steps=STEPS, global_batch_size=12, precision="fp64", max_grad_norm=None),
        optim=SgdConfig(peak_lr=LR, weight_decay=0.0, schedule="constant"),
        comm=CommConfig(**{"sync": "local", "compression_min_size": 1, **STREAMED, **comm}),
    )
    task = Task(model=copy.deepcopy(MODEL), train_data=data, val_data=data, loss_sums=losses)
    return settle(task, config, world, RunDirectory(folder), MetricLog(None, []))


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def gap(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def trained(job, steps, at_each_step=lambda training: None):
    """Train on to `steps` steps."""
    training = start_training(job)
    while training.step < steps:
        train_step(job, training)
        at_each_step(training)
    return training


@torch.no_grad()
def put_mean_into(outer, workers):
    """What local SGD of a period of 1 does: arXiv:1808.07217, algorithm 1."""
    for parameter, *of_workers in zip(*(model.parameters() for model in (outer, *workers)), strict=True):
        mean = torch.stack(of_workers).mean(0)
        for each in (parameter, *of_workers):
            each.copy_(mean)


def by_the_paper(job, steps):  # noqa: C901  as it is written there
    """Algorithm 2 of arXiv:2501.18512, all workers in one process; returns the workers and the outer weights."""
    comm, order, size = job.config.comm, job.order, job.world.size
    outer = copy.deepcopy(job.task.model).double()
    workers = [copy.deepcopy(outer) for _ in range(size)]
    optimizers = [torch.optim.SGD(worker.parameters(), lr=LR) for worker in workers]
    names = [name for name, _ in outer.named_parameters()]
    fragments = in_fragments({name: p.numel() for name, p in outer.named_parameters()}, comm.fragments)
    assert [name for own in fragments for name in own] == names
    of_fragment = [[dict(outer.named_parameters())[name] for name in own] for own in fragments]
    lr = comm.outer_lr or (0.7 if comm.outer == "nesterov" else 1.0)
    momentum = (comm.outer_momentum or 1 - lr / size**0.5) if comm.outer == "nesterov" else 0.0
    outer_steps = [torch.optim.SGD(own, lr=lr, momentum=momentum, nesterov=momentum > 0) for own in of_fragment]
    sent = {}
    for t in range(1, steps + 1):
        samples = order.global_batch(t - 1)
        for rank, (worker, optimizer) in enumerate(zip(workers, optimizers, strict=True)):
            optimizer.zero_grad()
            for positions in order.micro_batches(t - 1, rank):
                batch = job.task.train_data.batch(samples[positions])
                (losses(worker, batch)["loss"] * size / len(samples)).backward()
            optimizer.step()
        if t <= comm.sync_warmup_steps:
            put_mean_into(outer, workers)
            continue
        t -= comm.sync_warmup_steps
        for p, own in enumerate(fragments):
            offset = p * comm.period // comm.fragments
            if (t - offset) % comm.period == 0:
                sent[p, t] = [[dict(w.named_parameters())[name].detach().clone() for name in own] for w in workers]
            if (p, t - comm.overlap_steps) in sent:
                for i, parameter in enumerate(of_fragment[p]):
                    mean = torch.stack([of_worker[i] for of_worker in sent[p, t - comm.overlap_steps]]).mean(0)
                    parameter.grad = parameter.detach() - mean
                outer_steps[p].step()
                mix = comm.overlap_mix if comm.overlap_steps else 0.0
                is_delayed = comm.overlap_steps and comm.overlap_rule == "delayed"
                with torch.no_grad():
                    for worker, then in zip(workers, sent[p, t - comm.overlap_steps], strict=True):
                        for name, parameter, before in zip(own, of_fragment[p], then, strict=True):
                            mine = dict(worker.named_parameters())[name]
                            if is_delayed:  # arXiv:2006.00441: what was moved by since is kept
                                mine.add_(parameter - before)
                            else:
                                mine.copy_(mix * mine + (1 - mix) * parameter)
    return workers, outer


@pytest.mark.parametrize(
    "comm",
    [
        {},
        {"outer": "nesterov", "outer_momentum": 0.9},
        {"overlap_steps": 0},
        {"fragments": 1, "overlap_steps": 2, "overlap_mix": 0.0},
        {"fragments": 3, "overlap_steps": 4, "outer_lr": 0.5},
        {"overlap_rule": "delayed"},
        {"fragments": 3, "overlap_steps": 4, "overlap_rule": "delayed", "outer": "nesterov", "sync_warmup_steps": 2},
        {"outer": "nesterov", "sync_warmup_steps": 4},
        {"fragments": 1, "overlap_steps": 0, "outer_lr": 0.5, "sync_warmup_steps": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [2, 3])
def test_it_is_the_papers(tmp_path, comm, size):
    def work(world):
        job = job_of(world, tmp_path, **comm)
        workers, outer = by_the_paper(job, STEPS)
        training = trained(job, STEPS)
        training.component(OuterUpdates).arrive()
        last = training.component(OuterUpdates).state_dict()["last"]
        return gap(weights(training.model), weights(workers[world.rank])), gap(last, weights(outer))

    for own, last in run_ranks(size, work):
        assert own < 1e-12
        assert last < 1e-12


@pytest.mark.parametrize(
    "comm",
    [
        {},
        {"overlap_rule": "delayed"},
        {"outer": "nesterov", "compression": "int8"},
        {"compression": "powersgd:1", "overlap_rule": "delayed"},
    ],
    ids=str,
)
def test_looking_changes_nothing_and_a_run_goes_on_bitwise_from_every_step(tmp_path, comm):
    """Whatever is on its way then: it is waited for, saved, and taken when it is due."""

    def cut(step):
        def work(world):
            folder = tmp_path / f"cut-{step}"
            job = job_of(world, folder, **comm)
            with Saver(job) as saver:
                saver.save(trained(job, step, lambda training: evaluate(job, training)), {})
                saver.finish()
            return weights(trained(job_of(world, folder, **comm), STEPS).model)

        return work

    whole = run_ranks(2, lambda world: weights(trained(job_of(world, tmp_path / "whole", **comm), STEPS).model))
    assert gap(whole[0], whole[1]) > 1e-6  # they have drifted apart again
    for step in range(4, 10) if len(comm) < 2 else (5, 7):
        for one, other in zip(whole, run_ranks(2, cut(step)), strict=True):
            assert gap(one, other) == 0


@pytest.mark.parametrize("comm", [{}, {"fragments": 1}, {"fragments": 4, "overlap_steps": 0}], ids=str)
def test_a_run_saves_evaluates_and_compares_replicas_while_averages_are_under_way(tmp_path, comm):
    """The loop itself, with what is on by default: it compares replicas before each save."""

    def work(world):
        job = job_of(world, tmp_path / "looked", **comm)
        config = dataclasses.replace(
            job.config,
            checkpoint=CheckpointConfig(every=3, keep_last=None),
            eval=EvalConfig(every=4),
            health=HealthConfig(replica_check_every=1),
        )
        looked = settle(job.task, config, world, job.run, MetricLog(None, []))
        fit(looked)
        plain = trained(job_of(world, tmp_path / "plain", **comm), STEPS)
        plain.strategy.end(world, plain)
        return gap(weights(looked.task.model), weights(plain.model))

    assert run_ranks(2, work) == [0, 0]


def test_ranks_end_alike(tmp_path):
    def work(world):
        job = job_of(world, tmp_path)
        training = trained(job, STEPS)
        training.strategy.end(world, training)
        return weights(training.model), world.sent

    (one, sent), (other, _) = run_ranks(2, work)
    assert gap(one, other) == 0
    assert {name.split(".")[1] for name in sent if name.startswith("outer.")} == {"0", "1"}


def test_another_number_of_ranks_goes_on(tmp_path, caplog):
    def work(steps):
        def of_rank(world):
            job = job_of(world, tmp_path, compression="int8", overlap_rule="delayed")
            training = trained(job, steps)
            with Saver(job) as saver:
                saver.save(training, {})
                saver.finish()
            outer = training.component(OuterUpdates)
            left = [codec.left_over() for codec in (outer.codecs if outer else [])]
            return {name: kept.clone() for own in left for name, kept in own.items()}

        return of_rank

    before = run_ranks(2, work(9))
    after = run_ranks(3, work(9))
    assert any(kept.any() for kept in before[0].values())
    for name in before[0]:
        total, now = (sum(kept[name] for kept in ranks) for ranks in (before, after))
        assert (total - now).abs().max() < 1e-12
    run_ranks(3, work(11))
    with caplog.at_level("INFO", "hvdtrain"):
        run_ranks(1, work(12))
    assert "3 ranks have trained apart, and one goes on: from the mean of their weights" in caplog.text
    run_ranks(2, work(13))  # which may be more again: all begin with that one's state


def test_fragments_are_neighbours_of_about_one_size():
    sizes = {"a": 4, "b": 1, "c": 3, "d": 8, "e": 1}
    assert in_fragments(sizes, 2) == [["a", "b", "c"], ["d", "e"]]
    assert in_fragments(sizes, 1) == [["a", "b", "c", "d", "e"]]
    assert [name for own in in_fragments(sizes, 9) for name in own] == [*sizes]
    assert in_fragments({}, 2) == [[], []]


def test_each_fragment_travels_once_in_a_period():
    schedule = Schedule(10, 4, 3)
    begun = [(step, p) for step in range(31) for p in schedule.begins(step)]
    assert begun[:5] == [(2, 1), (5, 2), (7, 3), (10, 0), (12, 1)]
    assert [(step - 3, p) for step in range(34) for p in schedule.ends(step)] == begun
    assert [Schedule(5, 1, 0).begins(step) for step in (0, 5, 7)] == [[], [0], []]


def test_periods_begin_after_the_warm_up():
    schedule = Schedule(5, 2, 3, warmup_steps=4)
    assert [(step, schedule.begins(step)) for step in range(12) if schedule.begins(step)] == [
        *((step, [0, 1]) for step in (1, 2, 3, 4)),
        *((6, [1]), (9, [0]), (11, [1])),
    ]
    assert [(step, schedule.ends(step)) for step in range(13) if schedule.ends(step)] == [
        *((step, [0, 1]) for step in (1, 2, 3, 4)),
        *((9, [1]), (12, [0])),
    ]
    assert [step for step in range(13) if schedule.is_equal_after(step)] == [0, 1, 2, 3, 4]
    assert [step for step in range(13) if Schedule(5, 1, 0, 2).is_equal_after(step)] == [0, 1, 2, 7, 12]


@pytest.mark.parametrize(
    ("comm", "says"),
    [
        ({"fragments": 6}, "--comm.fragments 6 need as many steps of a period, and --comm.period is 5"),
        ({"overlap_steps": 5}, r"--comm.overlap-steps 5 must be less than --comm.period 5"),
    ],
)
def test_what_does_not_fit_a_period_is_refused(comm, says):
    with pytest.raises(ConfigError, match=says):
        CommConfig(**{"sync": "local", **STREAMED, **comm})


REFUSED = {
    "--optim.shard": "needs what all ranks share in each step, and with --comm.sync local they share nothing",
    "--train.ema": "needs what all ranks share in each step, and with --comm.sync local they share nothing",
    "--optim.shard sums gradients in parts": "leave one of them out, or use --comm.compression fp16",
}


def test_every_combination_trains_or_is_refused_in_one_sentence(tmp_path):
    """Sharded state, moving averages, local updates and formats, each with each other."""

    def work(world):
        found = {}
        formats = ("none", "fp16", "bf16", "int8", "powersgd:1", "topk:0.3")
        ways = itertools.product((False, True), (None, 0.5), ("every-step", "local"), formats)
        for shard, ema, sync, compression in ways:
            job = job_of(world, tmp_path, sync=sync, compression=compression)
            config = dataclasses.replace(
                job.config,
                optim=dataclasses.replace(job.config.optim, shard=shard),
                train=dataclasses.replace(job.config.train, ema=ema),
            )
            exact = dataclasses.replace(config, comm=CommConfig())
            why = why_refused(exact, compression=compression, sync=sync, **STREAMED)
            try:
                job = settle(job.task, config, world, RunDirectory(tmp_path), MetricLog(None, []))
                training = start_training(job)
                train_step(job, training)
                found[shard, ema, sync, compression] = "trained"
            except ConfigError as error:
                found[shard, ema, sync, compression] = str(error)
            assert (why or "trained") == found[shard, ema, sync, compression]
        return found

    one, other = run_ranks(2, work)
    assert one == other
    for (shard, ema, sync, compression), said in one.items():
        is_refused = (sync == "local" and (shard or ema)) or (shard and compression not in ("none", "fp16"))
        assert (said != "trained") == bool(is_refused), (shard, ema, sync, compression, said)
        if is_refused:
            assert "\n" not in said
            assert any(said.startswith(begin) and end in said for begin, end in REFUSED.items()), said
