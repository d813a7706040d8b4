"""Muon's updates against the singular value decomposition, and against torch's own optimizer."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.optim.composite import Composite
from hvdtrain.optim.muon import MuonConfig
from hvdtrain.optim.orthogonal import Muon, multiply_in_bf16, orthogonal
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import Config, TrainConfig
from hvdtrain.trainer import Task, settle
from hvdtrain.trainer.state import start_training
from hvdtrain.world import SoloWorld

SHAPES = [(24, 24), (48, 24), (24, 48), (24, 24), (1, 5), (48, 24)]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.grad = gradient.to(parameter.dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_update_has_the_singular_vectors_of_the_matrix(shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, _, right = torch.linalg.svd(start, full_matrices=False)
    # Nearly singular matrices would need more iterations.
    values = torch.linspace(1.0, 0.2, min(shape), dtype=torch.float64)
    matrix = left @ torch.diag(values) @ right
    update = orthogonal(matrix[None], torch.float32)[0]
    values = left.T @ update @ right.T
    assert torch.allclose(values, torch.diag(values.diagonal()), atol=1e-9)
    assert values.diagonal().min() > 0.5
    assert values.diagonal().max() < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_steps_are_those_of_torch_but_for_its_bfloat16(dtype: torch.dtype) -> None:
    own, torchs = parameters(dtype), parameters(dtype)
    before = [p.detach().clone() for p in own]
    theirs = torch.optim.Muon(torchs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizers = [Muon(own, lr=1e-2, weight_decay=0.1), theirs]
    for step in range(4):
        for some, optimizer in zip((own, torchs), optimizers, strict=True):
            give_gradients(some, step)
            some[2].grad = None if step == 1 else some[2].grad  # one that a step leaves out
            optimizer.step()
    for mine, other, start in zip(own, torchs, before, strict=True):
        assert (mine - other).norm() < 0.03 * (other - start).norm()
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert state.keys() == states[1][number].keys()
        assert torch.allclose(state["momentum_buffer"], states[1][number]["momentum_buffer"])


def test_an_update_does_not_depend_on_the_matrices_beside_it() -> None:
    together, alone = parameters(torch.float64), parameters(torch.float64)
    give_gradients(together, 0)
    give_gradients(alone, 0)
    Muon(together, lr=1e-2).step()
    for parameter in alone:
        Muon([parameter], lr=1e-2).step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("is_composite", [False, True])
def test_trainings_in_bfloat16_make_updates_orthogonal_in_it(is_composite: bool) -> None:
    whole, fast = parameters(torch.float32), parameters(torch.float32)
    for own in (whole, fast):
        muon: torch.optim.Optimizer = Muon(own, lr=1e-2)
        optimizer = Composite(muon.param_groups, [muon]) if is_composite else muon
        if own is fast:
            multiply_in_bf16(optimizer)
        give_gradients(own, 0)
        optimizer.step()
    for mine, other, start in zip(fast, whole, parameters(torch.float32), strict=True):
        assert not torch.equal(mine, other)
        assert (mine - other).norm() < 0.03 * (other - start).norm()


def test_a_training_says_so_to_its_optimizer(tmp_path: Path) -> None:
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    types = {}
    for precision in ("fp32", "bf16-true"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24, bias=False), nn.Linear(24, 1))
        task = Task(
            model=model,
            train_data=TensorSamples(inputs, inputs[:, :1]),
            val_data=TensorSamples(inputs, inputs[:, :1]),
            loss_sums=lambda model, batch: {"loss": (model(batch[0]) - batch[1]).square().sum()},
        )
        train = TrainConfig(steps=1, global_batch_size=8, precision=cast(Any, precision))
        config = Config(train=train, optim=MuonConfig(peak_lr=0.01, warmup_steps=0))
        world = SoloWorld(torch.device("cpu"), Launch("none"))
        job = settle(task, config, world, RunDirectory(tmp_path), MetricLog(None, []))
        optimizer: Any = start_training(dataclasses.replace(job, directory=None)).optimizer
        types[precision] = [part._on_cpus for part in optimizer.parts if isinstance(part, Muon)]
    assert types == {"fp32": [torch.float32], "bf16-true": [torch.bfloat16]}


def test_the_setting_of_momentum_is_the_optimizers() -> None:
    moved = {}
    for momentum in (0.95, 0.5):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.5)
        optimizer = MuonConfig(momentum=momentum).build(model)
        for step in range(2):
            give_gradients(list(model.parameters()), step)
            optimizer.step()
        moved[momentum] = cast(nn.Linear, model[0]).weight.detach().clone()
    assert not torch.equal(moved[0.95], moved[0.5])


def test_embeddings_may_learn_at_a_rate_of_their_own() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    rates = {}
    for factor in (1.0, 3.0):
        optimizer = MuonConfig(peak_lr=0.01, embedding_lr_factor=factor).build(model)
        rates[factor] = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert set(rates[factor]) == set(model.parameters())
    ends = {model[0].weight, cast(nn.Linear, model[3]).weight}
    assert set(rates[1.0].values()) == {0.01}
    assert {p for p, rate in rates[3.0].items() if rate == pytest.approx(0.03)} == ends
    assert {rate for p, rate in rates[3.0].items() if p not in ends} == {0.01}


def test_a_closure_differentiates_wherever_the_step_is_taken() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = MuonConfig().build(model)

    def closure() -> Any:
        loss = model(torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():  # as torch's own optimizers allow it
        optimizer.step(closure)
    assert all(parameter.grad is not None for parameter in model.parameters())
