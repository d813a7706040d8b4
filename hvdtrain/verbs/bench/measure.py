"""Variants of a recipe, measured in one process.

On CPUs they take turns, so that what slows the machine slows all of them alike; on GPUs there is room for one.
"""

from __future__ import annotations

import dataclasses
import gc
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hvdtrain.errors import ConfigError
from hvdtrain.models.linear import takes_onednn
from hvdtrain.process.progress import Progress
from hvdtrain.settings.compression import EXACT
from hvdtrain.trainer import Job, Recipe, Task, train_step
from hvdtrain.trainer.device_clock import finish
from hvdtrain.trainer.rehearsal import rehearse
from hvdtrain.trainer.state import Training, start_training
from hvdtrain.trainer.task import build_task
from hvdtrain.verbs.phase_clock import PhaseClock
from hvdtrain.world import World

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
    ("comm", "compression", EXACT),
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


def are_measured_apart(device: torch.device) -> bool:
    """Return whether variants are built, measured and freed one after another, and their parts timed apart.

    Side by side their weights would fill a GPU; and to tell a part's own time, the GPU must be waited for at its end,
    which is not to be in the figure of the whole step. On CPUs they take turns: their speed changes with the machine's.
    """
    return device.type == "cuda"


@dataclass
class Variant:
    """One way of training, and what was measured of it."""

    name: str
    num_ranks: int
    plan: str
    """Its batch arithmetic."""
    samples_per_step: int
    targets_per_step: int
    rehearsal: tuple[Job, Training] | None
    """What is measured; None once it has been freed."""
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
        targets = job.task.train_data.num_targets(samples)
        return Variant(name, world.size, str(job.plan), len(samples), targets, (job, training))

    def run(self, steps: int, is_counted: bool) -> None:
        """Take some steps; where clocks are costly, as many once more for the parts. Collective."""
        assert self.rehearsal is not None
        device = self.rehearsal[0].world.device
        clock = PhaseClock(device)
        seconds = 0.0
        if are_measured_apart(device):
            seconds = self._seconds(steps, Progress())
        with_clock = self._seconds(steps, clock)
        taken = clock.take()
        if is_counted:
            self.steps_s.append(seconds or with_clock)
            self.parts_s.append({part: taken.get(part, 0.0) / steps for part in PARTS})

    def _seconds(self, steps: int, progress: Progress) -> float:
        """Return the seconds of a step, the mean of some. Collective."""
        assert self.rehearsal is not None
        job, training = self.rehearsal
        world = job.world
        world.progress = progress
        world.barrier("bench")
        if isinstance(progress, PhaseClock):
            progress.take()
        started = time.perf_counter()
        for _ in range(steps):
            train_step(job, training)
        finish(world.device)
        return (time.perf_counter() - started) / steps

    def free(self) -> None:
        """Give its memory back. Collective: what averages its gradients must go on all ranks at the same place."""
        assert self.rehearsal is not None
        device = self.rehearsal[0].world.device
        self.rehearsal[1].close()
        self.rehearsal = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


class Possible:
    """The variants that are possible here, built one after another as they are asked for.

    Args:
        recipe: as it is; raises ConfigError where that is not possible.
        task: of it.
        world: the ranks.
        knobs: also what changes one setting.
    """

    def __init__(self, recipe: Recipe, task: Task, world: World, knobs: bool) -> None:
        self._recipe, self._task, self._world, self._knobs = recipe, task, world, knobs
        self.refused: list[str] = []
        """Why the others are not, as far as they have been come to."""

    def __iter__(self) -> Iterator[Variant]:
        world = self._world
        is_first = True
        for name, variant in variants(self._recipe, world.size, world.device):
            has_other_data = variant.data != self._recipe.data
            if not is_first and not self._knobs and not has_other_data:
                continue
            try:
                own = self._task
                if has_other_data:
                    own = world.together(lambda: build_task(variant, _silent), "bench.build")  # noqa: B023
                built = Variant.of(name, variant, own, world)
            except ConfigError as error:
                if is_first:
                    raise
                self.refused.append(f"{name}: {error}")
                continue
            is_first = False
            yield built
            del built, own


def _silent(text: str) -> None:
    """Say nothing: the recipe as it is has said it."""


def memory_peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held: of the GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
