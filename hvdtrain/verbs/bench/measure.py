"""Variants of a recipe that take turns in one process: what slows the machine meanwhile slows all of them alike."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hvdtrain.errors import ConfigError
from hvdtrain.models.linear import takes_onednn
from hvdtrain.trainer import Job, Recipe, Task, train_step
from hvdtrain.trainer.rehearsal import rehearse
from hvdtrain.trainer.state import Training, start_training
from hvdtrain.verbs.phase_clock import PhaseClock, finish
from hvdtrain.world import CODECS, World

# What a person calls the phases that the training loop notes.
PARTS = ("data", "forward", "backward", "communication", "update", "rest")

# Section, setting and the values that are tried. Buckets stand in the place of Horovod's fusion threshold and groups.
# Its cycle time cannot change in a process: started anew, Horovod 0.28.1 crashes where that and the threshold are set
# (BayesianParameter::SetValue). benchmarks/waiting.py measures it.
_KNOBS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("model", "compile", ("model", "blocks")),
    ("train", "precision", ("bf16",)),
    ("optim", "kernel", ("fused", "foreach")),
    ("comm", "bucket_mib", (1, 4, 25, 100)),
    ("comm", "compression", tuple(CODECS)),
)


def variants(recipe: Recipe, size: int, device: torch.device) -> Iterator[tuple[str, Recipe]]:
    """Yield the recipe as it is, then with one setting changed each; between ranks only if there are several.

    Where data that is read can be made up instead, that comes first: the difference is what input costs.
    """
    yield "as it is", recipe
    data: Any = recipe.data
    if getattr(data, "synthetic", True) is False:
        without_input: Any = {"data": dataclasses.replace(data, synthetic=True, workers=0)}
        yield "--data.synthetic", dataclasses.replace(recipe, **without_input)
    for section, setting, values in _KNOBS:
        part: Any = getattr(recipe, section)
        is_idle = section == "comm" and size == 1
        if is_idle or not hasattr(part, setting):
            continue
        for value in values:
            if getattr(part, setting) != value:
                changed: Any = {section: dataclasses.replace(part, **{setting: value})}
                yield f"--{section}.{setting.replace('_', '-')} {value}", dataclasses.replace(recipe, **changed)
    if device.type == "cpu" and recipe.train.precision == "fp32":
        other: Any = "torch" if takes_onednn(recipe.model.linear, device) else "onednn"
        model = dataclasses.replace(recipe.model, linear=other)
        yield f"--model.linear {other}", dataclasses.replace(recipe, model=model)
    train = recipe.train
    if train.accum_steps in (None, 1) and train.global_batch_size is not None:
        train = dataclasses.replace(train, accum_steps=4, global_batch_size=4 * train.global_batch_size)
        yield "accumulation 4, batch x 4", dataclasses.replace(recipe, train=train)


@dataclass
class Variant:
    """One way of training, and what was measured of it."""

    name: str
    job: Job
    training: Training
    samples_per_step: int
    targets_per_step: int
    steps_s: list[float] = field(default_factory=list)
    """Seconds of each round's mean step."""
    parts_s: list[dict[str, float]] = field(default_factory=list)
    """Seconds of the parts of each round's mean step, on rank 0."""

    @staticmethod
    def of(name: str, recipe: Recipe, task: Task, world: World) -> Variant:
        """Build it, with weights of its own. Collective.

        Raises:
            ConfigError: it does not fit this model or these ranks.
        """
        job = world.together(lambda: rehearse(task, recipe, world, only_full_batches=True), "bench.settle")
        training = start_training(job)
        samples = job.order.global_batch(0)
        return Variant(name, job, training, len(samples), job.task.train_data.num_targets(samples))

    def run(self, steps: int, is_counted: bool) -> None:
        """Take some steps. Collective."""
        world = self.job.world
        world.barrier("bench")
        progress = world.progress
        assert isinstance(progress, PhaseClock)
        progress.take()
        started = time.perf_counter()
        for _ in range(steps):
            train_step(self.job, self.training)
        finish(world.device)
        seconds = (time.perf_counter() - started) / steps
        taken = progress.take()
        parts = {part: taken.get(part, 0.0) / steps for part in PARTS}
        if is_counted:
            self.steps_s.append(seconds)
            self.parts_s.append(parts)


def build_variants(recipe: Recipe, task: Task, world: World, knobs: bool) -> tuple[list[Variant], list[str]]:
    """Return the variants that are possible here, and why the others are not. Collective."""
    built: list[Variant] = []
    refused = []
    for name, variant in variants(recipe, world.size, world.device):
        has_other_data = variant.data != recipe.data
        if built and not knobs and not has_other_data:
            continue
        try:
            own = task if not has_other_data else world.together(lambda: variant.build(_silent), "bench.build")  # noqa: B023
            built.append(Variant.of(name, variant, own, world))
        except ConfigError as error:
            if not built:
                raise
            refused.append(f"{name}: {error}")
    return built, refused


def _silent(text: str) -> None:
    """Say nothing: the recipe as it is has said it."""


def memory_peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: of the GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
