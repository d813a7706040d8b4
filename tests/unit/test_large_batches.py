"""What large batches need: rates for each layer, by the papers' formulas, and schedules that fall in steps."""

import copy
import json
import math
import os

import numpy as np
import pytest
import torch

import hvdtrain
from hvdtrain import OptimConfig
from hvdtrain.errors import ConfigError
from hvdtrain.optim.layerwise import Lamb, Lars
from hvdtrain.optim.schedule import learning_rate
from hvdtrain.optim.table import build_optimizer, with_name
from hvdtrain.trainer.plateau import Plateau

GRADIENTS = [
    np.array([[0.3, -0.2], [0.05, 0.4]]),
    np.array([[-0.1, 0.2], [0.6, 0.0]]),
    np.array([[0.2, 0.2], [0.1, 0.3]]),
]
WEIGHT = np.array([[1.0, -2.0], [0.5, 0.25]])


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


def steps_of(optimizer_of, decay):
    weight = torch.nn.Parameter(torch.tensor(WEIGHT))
    optimizer = optimizer_of([{"params": [weight], "weight_decay": decay}])
    for gradient in GRADIENTS:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    return weight.detach().numpy()


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lars_is_that_of_its_paper(decay):
    """Algorithm 1 of arXiv:1708.03888; without decay, SGD with momentum."""
    w, v, rate, momentum, trust = WEIGHT.copy(), np.zeros((2, 2)), 0.5, 0.9, 0.02
    for g in GRADIENTS:
        local = trust * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w)) if decay else 1.0
        v = momentum * v + rate * local * (g + decay * w)
        w = w - v
    ours = steps_of(lambda groups: Lars(groups, rate, momentum, trust=trust), decay)
    np.testing.assert_allclose(ours, w, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lamb_is_that_of_its_paper(decay):
    """Algorithm 2 of arXiv:1904.00962 with the correction of the bias; without decay, Adam."""
    w, m, v, rate, (b1, b2), eps = WEIGHT.copy(), np.zeros((2, 2)), np.zeros((2, 2)), 0.1, (0.9, 0.95), 1e-6
    for t, g in enumerate(GRADIENTS, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        r = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * w
        w = w - rate * r * (np.linalg.norm(w) / np.linalg.norm(r) if decay else 1.0)
    ours = steps_of(lambda groups: Lamb(groups, rate, (b1, b2), eps), decay)
    np.testing.assert_allclose(ours, w, rtol=1e-12)


@pytest.mark.parametrize("kind", [Lars, Lamb])
def test_weights_or_gradients_of_zero_keep_numbers(kind):
    for start, gradient in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        weight = torch.nn.Parameter(torch.full((2, 2), start))
        optimizer = kind([{"params": [weight], "weight_decay": 0.1}], lr=0.1)
        weight.grad = torch.full((2, 2), gradient)
        optimizer.step()
        assert weight.isfinite().all()


@pytest.mark.parametrize("name", ["lars", "lamb", "sgd"])
def test_norms_and_biases_are_not_decayed_and_states_load(name):
    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        optim = with_name(OptimConfig(peak_lr=0.1, weight_decay=0.5), name)
        return model, build_optimizer(optim, model)

    def step(model, optimizer):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, number + 1.0)
        optimizer.step()

    model, optimizer = build()
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.5, 0, 0, 0]
    step(model, optimizer)
    twin, other = build()
    step(twin, other)
    third, loaded = build()
    third.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share its tensors
    for pair in ((model, optimizer), (third, loaded)):
        step(*pair)
    for one, again in zip(model.parameters(), third.parameters(), strict=True):
        assert torch.equal(one, again)


def test_nesterov_is_torchs():
    model = torch.nn.Linear(1, 1)
    optim = with_name(OptimConfig(), "sgd")
    for momentum, nesterov in ((0.9, True), (0.9, False), (0.0, True)):
        config = type(optim)(momentum=momentum, nesterov=nesterov)
        assert build_optimizer(config, model).param_groups[0]["nesterov"] == (nesterov and momentum > 0)


def rates(num_steps=90, **settings):
    return [learning_rate(OptimConfig(peak_lr=1.0, **settings), step, num_steps) for step in range(num_steps)]


def test_multistep_is_torchs_in_shares_of_the_run():
    """Epochs 30, 60 and 80 of 90."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60, 80], gamma=0.1)
    expected = []
    for _ in range(90):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(schedule="multistep") == pytest.approx(expected)


def test_step_falls_again_and_again():
    expected = [0.5 ** (step // 20) for step in range(90)]
    assert rates(schedule="step", step_fraction=20 / 90, decay_factor=0.5) == pytest.approx(expected)
    assert rates(1, schedule="step") == [1.0]


def test_the_warm_up_comes_first():
    assert rates(schedule="multistep", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def plateau(factor=0.5, patience=2):
    return Plateau(factor, patience)


def factors(component, losses):
    found = []
    for loss in losses:
        component.after_evaluation(None, {"val/loss": loss})
        found.append(component.lr_factor())
    return found


def test_plateau_falls_when_nothing_gets_better():
    """What torch's ReduceLROnPlateau does with one evaluation less of patience, and no threshold."""
    losses = [3, 2, 2.5, 2.1, 1.9, 1.9, math.nan, 1.0, 1.0, 1.0, 1.0]
    assert factors(plateau(), losses) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]


def test_plateau_goes_on_where_it_was():
    losses = [3, 2, 2.5, 2.1, 1.9, 1.9, 2, 1.0, 1.0, 1.0, 1.0]
    whole = factors(plateau(), losses)
    for cut in range(len(losses)):
        first, then = plateau(), plateau()
        before = factors(first, losses[:cut])
        then.load_state_dict(first.state_dict())
        assert before + factors(then, losses[cut:]) == whole


def test_plateau_follows_evaluations_of_a_run(tmp_path):
    """Its rate reaches the optimizer: with a rate that is too small to learn, every evaluation is no better."""

    class Still(hvdtrain.Recipe):
        """A model that cannot get better."""

        def build(self, say):
            x = torch.ones(4, 1)
            data = hvdtrain.TensorSamples(x, x)
            return hvdtrain.Task(
                model=torch.nn.Linear(1, 1),
                train_data=data,
                val_data=data,
                loss_sums=lambda model, batch: {"loss": (0 * model(batch[0]) + 1).sum()},
            )

    recipe = Still(
        train=hvdtrain.TrainConfig(steps=8, global_batch_size=4),
        optim=OptimConfig(schedule="plateau", patience=2, decay_factor=0.5, peak_lr=0.25),
        log=hvdtrain.LogConfig(every=1),
    )
    with pytest.raises(ConfigError, match=r"--eval\.every"):
        hvdtrain.train(recipe, run_dir=tmp_path / "none")
    hvdtrain.train(recipe, run_dir=tmp_path / "run", eval={"every": 1}, train={"max_time": None})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line["train/lr"] for line in lines if "train/lr" in line]
    # The first evaluation is the best of all; then two bring nothing, and the rate falls for the step that follows.
    assert found == pytest.approx([0.25, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625, 0.03125])
