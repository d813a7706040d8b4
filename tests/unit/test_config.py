"""Settings: checks, batch arithmetic, dictionaries, schedules."""

import math

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.optim.schedule import check_schedule, learning_rate
from hvdtrain.settings import Config, OptimConfig, TrainConfig, keep_batch, merge, plan_batch, to_dict


@pytest.mark.parametrize(
    ("train", "size", "expected"),
    [
        ({"global_batch_size": 32}, 4, (32, 8, 1)),
        ({"global_batch_size": 32, "micro_batch_size": 4}, 4, (32, 4, 2)),
        ({"global_batch_size": 32, "accum_steps": 4}, 2, (32, 4, 4)),
        ({"micro_batch_size": 3, "accum_steps": 2}, 4, (24, 3, 2)),
        ({"micro_batch_size": 3}, 2, (6, 3, 1)),
        ({"global_batch_size": 32, "micro_batch_size": 4, "accum_steps": 2}, 4, (32, 4, 2)),
    ],
)
def test_two_batch_settings_fix_the_third(train, size, expected):
    plan = plan_batch(TrainConfig(**train), size)
    assert (plan.global_batch_size, plan.micro_batch_size, plan.accum_steps) == expected
    assert plan.micro_batch_size * plan.accum_steps * size == plan.global_batch_size


@pytest.mark.parametrize(
    ("train", "size", "says"),
    [
        ({"global_batch_size": 32}, 3, "30 or 33"),
        ({"global_batch_size": 2}, 4, "such as 4"),
        ({"global_batch_size": 32, "micro_batch_size": 5}, 2, "30 or 40"),
        ({"global_batch_size": 32, "micro_batch_size": 4, "accum_steps": 1}, 4, "= 16"),
        ({}, 4, "--train.global-batch-size"),
    ],
)
def test_batches_that_do_not_divide_name_numbers_that_would(train, size, says):
    with pytest.raises(ConfigError, match=says):
        plan_batch(TrainConfig(**train), size)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"global_batch_size": -1}, {"steps": 1, "epochs": 1.0}, {"max_grad_norm": 0.0}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        TrainConfig(**wrong)


def test_dictionary_and_back():
    config = Config(train=TrainConfig(steps=7, max_grad_norm=None), optim=OptimConfig(peak_lr=0.5))
    again = merge(Config(train=TrainConfig(max_grad_norm=None)), to_dict(config))
    assert again == config
    assert "epochs" not in to_dict(config)["train"]


def test_an_int_serves_as_a_float_and_dashes_as_underscores():
    config = merge(Config(), {"optim": {"peak-lr": 1}})
    assert config.optim.peak_lr == 1.0
    assert isinstance(config.optim.peak_lr, float)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"trian": {}}, "did you mean 'train'"),
        ({"train": {"step": 5}}, "did you mean 'train.steps'"),
        ({"train": {"steps": "many"}}, "must be of type int"),
        ({"train": {"steps": True}}, "must be of type int"),
        ({"train": 5}, "is a section"),
        ({"optim": {"schedule": "cosin"}}, "'cosine'"),
    ],
)
def test_wrong_dictionaries_are_explained(values, says):
    with pytest.raises(ConfigError, match=says):
        merge(Config(), values, "file.toml")


def test_warmup_rises_linearly_to_the_peak():
    optim = OptimConfig(peak_lr=1.0, warmup_steps=4)
    assert [learning_rate(optim, step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(optim, 4, 100) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_end_at_the_final_fraction(schedule):
    optim = OptimConfig(peak_lr=2.0, schedule=schedule, warmup_steps=10, final_lr_fraction=0.1)
    rates = [learning_rate(optim, step, 100) for step in range(100)]
    assert rates[99] == pytest.approx(0.2)
    assert max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_middle_of_the_schedules():
    def middle(schedule):
        optim = OptimConfig(peak_lr=1.0, schedule=schedule, final_lr_fraction=0.0, decay_fraction=0.2)
        return [learning_rate(optim, step, 101) for step in (25, 50, 79, 90)]

    assert middle("constant") == [1.0, 1.0, 1.0, 1.0]
    assert middle("linear") == pytest.approx([0.75, 0.5, 0.21, 0.1])
    assert middle("cosine") == pytest.approx([(1 + math.cos(math.pi * p)) / 2 for p in (0.25, 0.5, 0.79, 0.9)])
    assert middle("wsd")[:3] == [1.0, 1.0, 1.0]
    assert middle("wsd")[3] == pytest.approx(0.1 / (0.2 * 101 / 101))


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="fewer than 10"):
        check_schedule(OptimConfig(warmup_steps=10), 10)


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ({}, 4, (4, 1)),  # less for each rank
        ({}, 1, (8, 2)),  # no more than memory is known to hold
        ({"micro_batch_size": 16}, 1, (16, 1)),  # unless asked for
        ({"micro_batch_size": 3}, 2, (2, 4)),
        ({}, 16, (1, 1)),
        ({"accum_steps": 4}, 2, (2, 4)),
        ({"accum_steps": 1}, 1, (8, 2)),  # 16 at a time are more than memory is known to hold
    ],
)
def test_a_run_keeps_its_global_batch_on_other_ranks(settings, ranks, expected):
    plan = keep_batch(TrainConfig(**settings), ranks, total=16, largest_micro=8)
    assert (plan.micro_batch_size, plan.accum_steps) == expected
    assert plan.micro_batch_size * plan.accum_steps * ranks == plan.global_batch_size == 16


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 8}, {"global_batch_size": 16, "accum_steps": 1}])
def test_a_batch_is_the_same_however_often_a_run_has_gone_on(settings):
    """Killed or not, and whatever other numbers of ranks it had meanwhile."""
    train = TrainConfig(**settings)
    plans = {ranks: keep_batch(train, ranks, 16, largest_micro=8) for ranks in (1, 2, 4)}
    plan = plans[2]
    for ranks in (2, 1, 1, 4, 4, 1, 2, 2):
        plan = keep_batch(train, ranks, 16, plan.largest_micro_batch_size)
        assert plan == plans[ranks]


def test_a_global_batch_that_cannot_be_kept_names_numbers_of_ranks():
    with pytest.raises(ConfigError, match="does not divide among 3 ranks: go on with 1, 2, 4 or 8"):
        keep_batch(TrainConfig(), 3, total=16, largest_micro=8)
