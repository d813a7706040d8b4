"""The verb `verify`, as a user starts it."""

import json

import pytest
from digits import write_digits

RECIPE = """
import dataclasses
import torch
import torch.nn.functional as F
import hvdtrain
from hvdtrain.process.launch import detect_launch

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(hvdtrain.Recipe):
    bug: bool = False

    def build(self, say):
        torch.manual_seed(self.train.seed)
        layers = [torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 1)]
        model = torch.nn.Sequential(*layers)
        data = hvdtrain.TensorSamples(torch.randn(100, 5), torch.randn(100, 1))

        def loss(model, batch):
            reduction = "mean" if self.bug else "sum"
            return {"loss": F.mse_loss(model(batch[0]), batch[1], reduction=reduction)}

        return hvdtrain.Task(model=model, train_data=data, val_data=data, loss_sums=loss)

def recipe():
    return Mine(train=hvdtrain.TrainConfig(steps=10, global_batch_size=16))
"""


@pytest.mark.parametrize(("launcher", "ranks"), [(None, 1), ("mpirun", 2), ("horovodrun-gloo", 2)])
def test_a_recipe_of_ones_own(hvdtrain, tmp_path, launcher, ranks):
    (tmp_path / "mine.py").write_text(RECIPE)
    done = hvdtrain("verify", "mine.py", "--json", "rows.json", launcher=launcher, ranks=ranks)
    assert done.code == 0, done.text
    answer = json.loads((tmp_path / "rows.json").read_text())
    assert answer["passed"] is True
    assert answer["ranks"] == ranks
    assert {row["number"] for row in answer["rows"]} == set(range(1, 12))
    assert "all that were run passed, 1 check not run, 1 warning" in done.out  # random numbers are drawn
    assert not list(tmp_path.glob("runs*"))


def test_a_bug_in_a_recipe_is_exit_code_1(hvdtrain, tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    done = hvdtrain("verify", "mine.py", "--bug", launcher="mpirun", ranks=2)
    assert done.code == 1, done.text
    assert "a loss that is a mean instead of a sum" in " ".join(done.out.split())
    assert "Traceback" not in done.text


def test_mnist(hvdtrain, tmp_path):
    write_digits(tmp_path)
    done = hvdtrain("verify", "mnist", "--data.root", tmp_path, launcher="mpirun", ranks=2)
    assert done.code == 0, done.text
    assert "all checks passed, 0 warnings" in done.out
    assert "verify mnist on 2 ranks" in done.out
    assert done.out.index("data:  ") < done.out.index("ranks are equal at the start")  # what is verified


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "1"], "at least 2"),
        (["--json", "mine.py/rows.json"], "cannot be written"),
        (["--run-dir", "x"], "no flag '--run-dir'"),
    ],
)
def test_mistakes_are_one_message(hvdtrain, tmp_path, arguments, says):
    (tmp_path / "mine.py").write_text(RECIPE)
    done = hvdtrain("verify", "mine.py", *arguments)
    assert done.code == 2, done.text
    assert says in done.err
    assert "Traceback" not in done.text
