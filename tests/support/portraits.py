"""What a run with some settings is, seen from outside: all that a setting may change, so that none changes nothing.

Left out is what only repeats a setting: config.toml, and the settings in a checkpoint.
"""

import dataclasses
import json
import re
import warnings
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import HvdtrainError
from hvdtrain.process.launch import Launch
from hvdtrain.recipes import load_recipe
from hvdtrain.recipes.given import apply
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.rundir.sinks import build_sinks
from hvdtrain.settings import CheckpointConfig, EvalConfig, LogConfig, OptimConfig, TrainConfig
from hvdtrain.settings.values import Source, nested
from hvdtrain.trainer import Recipe, Task, fit, settle
from hvdtrain.trainer.strategy import EveryStep
from hvdtrain.trainer.without_effect import without_effect
from hvdtrain.world import SoloWorld


class Block(nn.Module):
    """Half of the network; counts how often it is computed."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.times = nn.Linear(6, 6), nn.BatchNorm1d(6), 0

    def forward(self, x):
        self.times += 1
        return x + self.norm(self.linear(x)).tanh()


class Network(nn.Module):
    """Small, with everything that a setting speaks of: blocks, batch normalisation, dropout, matrices, vectors."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.drop = nn.Linear(4, 6), nn.Dropout(0.2)
        self.blocks, self.last = nn.ModuleList([Block(), Block()]), nn.Linear(6, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(self.drop(x))


@dataclass(frozen=True, kw_only=True)
class Small(Recipe):
    """The recipe of the portraits."""

    seen: list = field(default_factory=list)
    """The mode of the model, and how many samples each batch has."""

    def build(self, say):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(26, 4, generator=generator)
        y = x.sin().sum(1, keepdim=True)
        y[[13]] = torch.nan  # the first step, which has it, is skipped

        def loss_sums(model, batch):
            self.seen.append((model.training, len(batch[0])))
            return {"loss": (model(batch[0]) - batch[1]).square().sum()}

        held_out = TensorSamples(x[:5], y[:5])
        return Task(
            model=Network(self.train.seed), train_data=TensorSamples(x, y), val_data=held_out, loss_sums=loss_sums
        )


def small():
    """Return the recipe's own settings."""
    return Small(
        train=TrainConfig(steps=6, global_batch_size=4),
        optim=OptimConfig(peak_lr=0.05),
        log=LogConfig(every=3),
        eval=EvalConfig(every=4),
        checkpoint=CheckpointConfig(every=2, keep_last=2),
    )


class World(SoloWorld):
    """One process that counts how often it compares what ranks hold."""

    num_checks = 0

    def check_replicas(self, tensors, name):
        self.num_checks += 1


class Exchange(EveryStep):
    """Notes how gradients are to be averaged."""

    def wrap(self, world, optimizer, model, **options):
        self.options = {key: getattr(value, "name", value) for key, value in options.items()}
        return super().wrap(world, optimizer, model, **options)


class Lines(MetricLog):
    """Keeps what is said."""

    def __init__(self, sinks):
        super().__init__(None, sinks)
        self.said = []

    def say(self, text):
        self.said.append(text)


def portrait(folder, given, recipe=None):
    """Return what a run in `folder` with the settings given, `{"train.steps": 5}`, is; text where it is refused."""
    try:
        recipe = apply(recipe or small(), [(nested(given), Source("train()"))])
        recipe = dataclasses.replace(recipe, seen=[])
        return _trained(folder, recipe)
    except HvdtrainError as error:
        return f"{type(error).__name__}: {_without_numbers(str(error), folder)}"


def _trained(folder, recipe):
    run, world = RunDirectory(folder), World(torch.device("cpu"), Launch("none"))
    log = Lines([])
    log._sinks = build_sinks(run, recipe.log, log.say)
    task = recipe.build(log.say)
    job = dataclasses.replace(settle(task, recipe, world, run, log), strategy=Exchange())
    groups = []
    noted = task.build_optimizer

    def build_optimizer(optim, model):
        made = noted(optim, model)
        groups.append([type(made).__name__, [_plain_group(group) for group in made.param_groups]])
        return made

    job = dataclasses.replace(job, task=dataclasses.replace(task, build_optimizer=build_optimizer))
    folder.mkdir(parents=True)
    with torch.compiler.set_stance("force_eager"), closing(log), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when its compiler is imported
        reached = fit(job)
    model = task.model
    return {
        "said": [*without_effect(job), *(_without_numbers(line, folder) for line in log.said)],
        "reached": reached,
        "plan": (job.plan, job.num_steps, job.reading),
        "samples": [job.order.global_batch(step).tolist() for step in range(3)],
        "batches": recipe.seen,
        "weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "types": sorted({(type(module).__name__, str(module.forward)[:30]) for module in model.modules()}),
        "compiled": [name for name, module in model.named_modules() if module._compiled_call_impl is not None],
        "times": [block.times for block in model.blocks],
        "dtype": str(model.last.weight.dtype),
        "optimizer": groups[:1],
        "exchange": job.strategy.options,
        "checks": world.num_checks,
        "files": sorted(re.sub(r"tfevents.*", "", str(path.relative_to(folder))) for path in folder.rglob("*")),
        "metrics": [_plain_line(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
    }


def _plain_group(group):
    return {key: value for key, value in group.items() if key != "params"} | {"count": len(group["params"])}


def _plain_line(line):
    values = json.loads(line)
    return {key: value for key, value in values.items() if not key.startswith(("time", "through", "memory", "save"))}


def _without_numbers(text, folder):
    return re.sub(r"[\d.]+", "#", text.replace(str(folder), "RUN"))


def differences(one, other):
    """Return in what two portraits differ."""
    if isinstance(one, str) or isinstance(other, str):
        return [] if one == other else ["refused"]
    return [key for key in one if repr(one[key]) != repr(other[key])]


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that anything returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def task_portrait(given, folders):
    """Return what the recipe lm builds with the settings given, and what it writes to some folders."""
    try:
        recipe = apply(load_recipe("lm"), [(nested(given), Source("train()"))])
        task = recipe.build(lambda text: None)
    except HvdtrainError as error:
        return f"{type(error).__name__}: {error}"
    batch = task.train_data.batch(torch.tensor([0]))
    with torch.no_grad(), Sizes() as sizes:
        loss = task.loss_sums(task.model, batch)["loss"].item()
    return {
        "weights": {name: tensor.sum().item() for name, tensor in task.model.state_dict().items()},
        "tied": len(list(task.model.parameters())),
        "lengths": (len(task.train_data), len(task.val_data)),
        "samples": [tensor.tolist() for tensor in batch],
        "held out": [tensor.tolist() for tensor in task.val_data.batch(torch.tensor([0]))],
        "loss": loss,
        "largest": sizes.largest,
        "folders": [folder.exists() for folder in folders],
    }
