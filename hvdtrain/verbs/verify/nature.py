"""What verify finds out about a model before the checks: its precision, and whether samples see each other."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from hvdtrain.optim.table import with_name
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.step import forward_sums, train_step
from hvdtrain.verbs.verify.trial import Trial
from hvdtrain.world import Codec, codec_for, has_synchronized_layers

# Adam divides by the gradient's size: where the true gradient is zero, as of a bias before batch normalisation, it
# blows the last bits of fp64 up to about 1e-7 of a step. Every planted bug in the tests shows above 1e-4.
_FP64_TOLERANCE = 1e-5
# Its steps are no smooth function of the gradient: a last bit can turn them round.
_ROUGH = ("Rprop",)


@dataclasses.dataclass(frozen=True)
class Randomness:
    """What random numbers a model and its data draw."""

    is_by_sample: bool
    by_micro_batch: frozenset[str]
    """Whose numbers belong to micro-batches: torch, torch on the GPU, numpy, Python."""
    repeated: tuple[str, ...]
    """Functions that drew the same numbers in several micro-batches, from a generator of the user's."""


@dataclasses.dataclass(frozen=True)
class Nature:
    """What was found out about the model before the checks."""

    trial: Trial
    """In fp64 where the model runs in it, else with plain SGD, which does not blow rounding errors up."""
    own: Trial
    """With the user's own settings."""
    tolerance: float
    """Of relative differences."""
    depends_on_batch: bool
    in_step: bool
    randomness: Randomness
    """What is drawn at random in a few steps, on any rank."""

    @property
    def is_average(self) -> bool:
        """Return whether gradients are averaged at all."""
        return self.own.recipe.comm.op == "average"

    @property
    def codec(self) -> Codec:
        """Return a new codec, as the gradients have it."""
        return codec_for(self.own.recipe.comm)


def find_nature(own: Trial) -> Nature:
    """Find out in what precision the model can be compared, and whether its loss is a sum over samples. Collective."""
    precision, optim, tolerance = own.recipe.train.precision, own.recipe.optim, _FP64_TOLERANCE
    sgd = dataclasses.replace(with_name(optim, "sgd"), momentum=0.0)  # type: ignore[call-arg]
    if optim.name in _ROUGH:
        optim = sgd
    if all(own.world.all_gather_object(_runs_in_fp64(own), "verify.fp64")):
        precision = "fp64"
    else:
        optim = sgd
        tolerance = 1e-4 if precision == "fp32" else 5e-2
    if own.recipe.comm.compression != "none":
        kind = torch.float64 if precision == "fp64" else torch.float32
        optim, tolerance = sgd, max(tolerance, codec_for(own.recipe.comm).tolerance(kind))
    train = dataclasses.replace(own.recipe.train, precision=precision)
    trial = dataclasses.replace(own, recipe=dataclasses.replace(own.recipe, train=train, optim=optim))
    job = trial.job(trial.solo())
    training = start_training(job)
    in_step = has_synchronized_layers(training.model)
    randomness = _randomness(own)
    # What a micro-batch draws differs between a batch and its halves: that is row 9's, and says nothing of samples.
    depends_on_batch = not randomness.by_micro_batch and _depends_on_batch(trial)
    return Nature(trial, own, tolerance, depends_on_batch, in_step, randomness)


def _randomness(own: Trial) -> Randomness:
    """Watch two steps of all ranks. Collective."""
    job = own.job(own.world)
    training = start_training(job)
    training.randomness.is_observed = True
    for _ in range(2):
        train_step(job, training)
    found = training.randomness
    everyone = own.world.all_gather_object(
        (found.is_by_sample, found.by_micro_batch, found.own_draws), "verify.randomness"
    )
    draws = [draw for _, _, draws in everyone for draw in draws]
    repeated = sorted({name for name, digest in draws if draws.count((name, digest)) > 1})
    return Randomness(
        any(is_by_sample for is_by_sample, _, _ in everyone),
        frozenset().union(*(sources for _, sources, _ in everyone)),
        tuple(repeated),
    )


def _runs_in_fp64(trial: Trial) -> bool:
    try:
        job = trial.job(trial.solo(), precision="fp64")
        training = start_training(job)
        train_step(job, training)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return all(parameter.dtype == torch.float64 for parameter in training.model.parameters())


def _depends_on_batch(trial: Trial) -> bool:
    """Tell whether a sample's loss depends on what else is in its micro-batch, although losses are summed.

    A batch that holds every sample twice has twice the loss if losses are summed, and half the loss comes from each
    half of a batch unless samples see each other.
    """
    job = trial.job(trial.solo())
    training = start_training(job)
    n = min(8, len(job.task.train_data) // 2 * 2)
    samples = torch.arange(n)

    def loss(which: Tensor) -> float:
        place = (job.config.train.seed, 0)
        with torch.no_grad():
            sums = training.randomness.run(
                which, place, lambda: forward_sums(job, training.model, samples[which]), lambda sums: None
            )
        return float(sums["loss"])

    everything = torch.arange(n)
    together, twice = loss(everything), loss(torch.cat((everything, everything)))
    apart = loss(everything[: n // 2]) + loss(everything[n // 2 :])
    scale = max(abs(together), 1e-30)
    tolerance = 1e-9 if trial.recipe.train.precision == "fp64" else 1e-3
    is_sum = abs(twice - 2 * together) < 2 * tolerance * scale
    return bool(is_sum and abs(apart - together) > tolerance * scale)
