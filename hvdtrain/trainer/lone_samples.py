"""A micro-batch of one sample, which batch normalisation cannot normalise: found before the first step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.kept import KeptState
from hvdtrain.models.private_torch import BatchNorm
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.state import Training
from hvdtrain.trainer.step import forward_sums

# torch's own words.
_TORCH_SAYS = "Expected more than 1 value per channel"


def check_lone_samples(job: Job, training: Training) -> None:
    """Try one sample, where an epoch has micro-batches of one and the model trains batch normalisation.

    The short batch at the end of an epoch may leave a rank a single sample; without a look ahead the run would end
    there. Images are fine, as they have many values a channel: so it is tried. The model is left as it was. Collective.

    Raises:
        ConfigError: on all ranks alike: the model cannot train on one sample.
    """
    model = training.model
    is_normalised = any(isinstance(module, BatchNorm) and module.training for module in model.modules())
    if not is_normalised or training.runs_in_step:
        return
    lone = _lone_sample(job)
    job.world.together(lambda: _try(job, model, lone) if lone is not None else None, "lone")


def _lone_sample(job: Job) -> Tensor | None:
    """Return a sample, int64 `(1,)`, that is alone in a micro-batch of some rank; None where every one has company."""
    for step in {0, job.order.steps_per_epoch - 1}:
        for rank in range(job.world.size):
            for positions in job.order.micro_batches(step, rank):
                if len(positions) == 1:
                    return job.order.global_batch(step)[positions]
    return None


def _try(job: Job, model: nn.Module, sample: Tensor) -> None:
    kept = KeptState(model)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            forward_sums(job, model, sample)
    except ValueError as error:
        if _TORCH_SAYS not in str(error):
            raise
        raise ConfigError(
            "batch normalisation cannot train on a micro-batch of one sample, and an epoch of"
            f" {len(job.task.train_data):,} samples in global batches of {job.plan.global_batch_size}, micro-batches of"
            f" {job.plan.micro_batch_size}, has such ones: choose another --train.global-batch-size or"
            " --train.micro-batch-size, leave samples out of train_data, or normalise over all ranks"
            " (--model.sync-batch-norm)"
        ) from error
    finally:
        kept.put_back()
