"""`--train.precision auto`, and what is said where 16 bits are slow."""

import pytest
import torch
from test_components import job_of
from thread_world import run_ranks

from hvdtrain.errors import ConfigError
from hvdtrain.settings import Config, TrainConfig
from hvdtrain.trainer import precision, without_effect
from hvdtrain.trainer.scaler import LossScaler

AUTO = Config(train=TrainConfig(steps=3, precision="auto"))


@pytest.fixture
def flags(monkeypatch):
    """Return a function that gives the CPU some features, or takes all from it."""

    def give(*names, has_products=True):
        monkeypatch.setattr(precision, "cpuinfo", lambda: f"flags\t\t: fpu avx2 {' '.join(names)}\n")
        monkeypatch.setattr(precision, "has_products", lambda dtype: has_products)
        monkeypatch.setattr(without_effect, "has_products", lambda dtype: has_products)

    return give


def chosen_by(world, config=AUTO):
    settled, line = precision.settle_precision(config, world)
    return settled.train.precision, line


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512f", "avx512_bf16"}, True),
        ({"amx_bf16", "amx_tile"}, True),
        ({"avx2", "avx512f", "avx512_fp16", "amx_int8"}, False),
        (set(), False),
    ],
)
def test_what_multiplies_bf16(features, expected):
    assert precision.multiplies_bf16(features) == expected


def test_auto_is_what_the_cpu_is_fast_in(flags):
    flags("avx512_bf16")
    ((name, line),) = run_ranks(1, chosen_by)
    assert name == "bf16"
    assert line == "precision:  bf16, by --train.precision auto: the devices of all ranks are fast in bf16"
    flags("avx512_bf16", has_products=False)
    assert run_ranks(1, chosen_by)[0][0] == "fp32"
    flags("avx512f")
    assert run_ranks(1, chosen_by)[0][0] == "fp32"


def test_the_ranks_agree(flags):
    flags("avx512_bf16")

    def work(world):
        world.device = torch.device("meta" if world.rank == 1 else "cpu")
        return chosen_by(world)

    line = "precision:  fp32, by --train.precision auto: not every rank's device is fast in bf16"
    assert run_ranks(3, work) == [("fp32", line)] * 3


def test_what_was_asked_for_stays_without_asking_anybody():
    def work(world):
        config = Config(train=TrainConfig(steps=3, precision="fp16"))
        settled, line = precision.settle_precision(config, world)
        return settled is config, line, world.sent

    assert run_ranks(2, work) == [(True, "", [])] * 2


def test_a_job_knows_its_precision(tmp_path):
    with pytest.raises(ValueError, match="settle_precision"):
        job_of(tmp_path, precision="auto")


@pytest.mark.parametrize("name", ["bf16", "fp16", "bf16-true", "fp32", "fp64"])
def test_16_bits_that_are_slow_are_said(flags, tmp_path, name):
    job = job_of(tmp_path, precision=name)
    flags(has_products=False)
    said = [line for line in without_effect.without_effect(job) if line.startswith("precision:")]
    assert len(said) == (name not in ("fp32", "fp64"))
    assert all(f"  {name} makes products many times slower" in line for line in said)
    flags()
    assert not [line for line in without_effect.without_effect(job) if line.startswith("precision:")]


@pytest.mark.parametrize("learns", [True, False])
def test_complex_weights_and_a_loss_scaler_are_refused_in_a_sentence(learns):
    """torch's scaler raises NotImplementedError in the first step, on CPUs and GPUs."""
    model = torch.nn.Linear(2, 2)
    model.phase = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=learns)
    scaler = LossScaler(torch.device("cpu"))
    if learns:
        with pytest.raises(ConfigError, match="no complex numbers, as in phase of the model"):
            scaler.begin(model)
    else:
        scaler.begin(model)
