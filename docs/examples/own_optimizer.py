"""An optimizer of your own in a recipe: Lion (arXiv:2302.06675), 20 lines.

horovodrun -np 2 python -m hvdtrain train docs/examples/own_optimizer.py
"""

from dataclasses import dataclass

import torch

import hvdtrain


class Lion(torch.optim.Optimizer):
    """Moves each weight by the sign of a momentum."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.sub_(torch.lerp(parameter.grad, momentum, 0.9).sign_(), alpha=group["lr"])
                momentum.lerp_(parameter.grad, 0.01)


def squares(model, batch):
    x, y = batch
    return {"loss": (model(x) - y).square().sum()}


@dataclass(frozen=True, kw_only=True)
class Sine(hvdtrain.Recipe):
    """A small network that learns a sine."""

    def build(self, say):
        torch.manual_seed(self.train.seed)
        x = torch.linspace(-3, 3, 300).unsqueeze(1)
        return hvdtrain.Task(
            model=torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)),
            train_data=hvdtrain.TensorSamples(x, x.sin()),
            val_data=hvdtrain.TensorSamples(x, x.sin()),
            loss_sums=squares,
            build_optimizer=lambda optim, model: Lion(model.parameters(), optim.peak_lr),
        )


def recipe():
    return Sine(train=hvdtrain.TrainConfig(steps=300, global_batch_size=50), optim=hvdtrain.AdamWConfig(peak_lr=0.003))
