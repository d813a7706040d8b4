"""torch's compiler is loaded where something is compiled, and nowhere else; then all is as torch has it."""

import subprocess
import sys

import pytest
import torch

from hvdtrain.optim.private_optimizer import without_record

TRAIN = """
import sys, torch
import hvdtrain
from hvdtrain.optim.private_optimizer import without_record
hvdtrain.init()
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
optimizer = torch.optim.{name}(model.parameters(), lr=0.1)
state = optimizer.state_dict()
step = without_record(torch.optim.{name}.step)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    step(optimizer)
optimizer.load_state_dict(state)
optimizer.add_param_group({{"params": [torch.nn.Parameter(torch.ones(2))]}})
print("torch._dynamo" in sys.modules, "sympy" in sys.modules)
{then}
"""
COMPILE = """
@torch.compile(backend="eager")
def work(optimizer, x):
    optimizer.zero_grad()
    return x + 1
for _ in range(2):
    assert work(optimizer, torch.ones(2)).tolist() == [2, 2]
optimizer.zero_grad()
from torch.optim import Optimizer
print(vars(Optimizer.zero_grad.__wrapped__)["__dynamo_disable"].__module__)
"""


def test_it_is_loaded_late_and_then_all_is_as_torch_has_it():
    code = TRAIN.format(name="SGD", then=COMPILE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False False", "torch._dynamo.eval_frame"]


EACH = """
import sys, torch
import hvdtrain
from hvdtrain.optim.divisible import divisions
from hvdtrain.optim.muon import MuonConfig
from hvdtrain.optim.sgd import SgdConfig
model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 2))
kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and kind is not torch.optim.Optimizer]
kinds = [kind for kind in kinds if kind not in (torch.optim.LBFGS, torch.optim.SparseAdam)]
hvdtrain.init()
made = [kind([torch.nn.Parameter(torch.ones(2, 2))]) for kind in kinds]
made += [config.build(model) for config in (MuonConfig(peak_lr=0.1), SgdConfig(peak_lr=0.1, momentum=0.9))]
for optimizer in made:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    type(optimizer).step(optimizer)
    print(type(optimizer).__name__, *{"torch._dynamo", "sympy"} & {*sys.modules})
print(divisions(made[-2]), *{"torch._dynamo", "sympy"} & {*sys.modules})
"""


def test_no_step_of_torchs_loads_it_whoever_takes_it():
    """As a part of Muon's, or where it is only tried to see how far it can be divided."""
    done = subprocess.run([sys.executable, "-c", EACH], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *each, last = done.stdout.splitlines()
    assert len(each) > 12
    assert {"AdamW", "Muon", "Composite", "RMSprop"} <= {*each}
    assert all(len(line.split()) == 1 for line in each)
    assert last == "['parameters', 'elements', 'elements']"


CLASSES = [
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Rprop,
    torch.optim.ASGD,
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("is_differentiable", [False, True])
def test_a_lean_step_is_the_step(kind, is_differentiable):
    """Bitwise; gradients are recorded where the optimizer is differentiated through, and recording is as before."""
    results = []
    for is_lean in (False, True):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
        optimizer = kind([weight], lr=0.1, differentiable=is_differentiable)
        step = without_record(kind.step) if is_lean else kind.step
        assert (step is not kind.step) == is_lean
        values, recorded = weight.clone() if is_differentiable else weight, []
        optimizer.param_groups[0]["params"] = [values]
        optimizer.register_step_post_hook(lambda *_, recorded=recorded: recorded.append(torch.is_grad_enabled()))
        for number in range(3):
            values.grad = torch.sin(torch.arange(6.0) + number).reshape(2, 3)
            with torch.enable_grad():
                step(optimizer)
        results.append((values.detach().clone(), values.grad_fn is not None, recorded))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:] == (is_differentiable, [True] * 3)
