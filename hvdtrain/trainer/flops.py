"""Floating-point operations of a step."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from hvdtrain.models.compilation import uncompiled
from hvdtrain.models.private_torch import FakeTensorMode
from hvdtrain.trainer.fakes import fake_micro_batch, fake_model, micro_batch_samples
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.state import Training
from hvdtrain.trainer.step import forward_batch, forward_sums
from hvdtrain.trainer.utilization import peak_of
from hvdtrain.trainer.values import count_targets

# Of the forward pass and twice as many of the backward pass.
_PASSES = 3

if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x_shape: torch.Size, weight_shape: torch.Size, *rest: object, **more: object) -> int:
        """Return the operations of `hvdtrain.models.linear`, which torch does not count."""
        return 2 * math.prod(x_shape) * weight_shape[0]


def flops_per_step(job: Job, training: Training) -> float:
    """Return the operations of one step over all ranks.

    Those of the forward pass's matrix products, convolutions and attentions, as torch's `FlopCounterMode` counts them,
    and twice that for the backward pass (arXiv:2204.02311, appendix B); what is computed again does not count.
    """
    samples = job.order.global_batch(0)
    positions = job.order.micro_batches(0, 0)[0]
    with torch.no_grad(), uncompiled(), FlopCounterMode(display=False) as counter:
        forward_sums(job, training.model, samples[positions])
    return float(_PASSES * counter.get_total_flops()) / len(positions) * len(samples)


def with_flops(job: Job) -> Job:
    """Return the job with the operations of a term of its loss, where the utilization of its devices is logged.

    They are counted on fake tensors, before anything has been done to the model: nothing is computed, nothing drawn.
    """
    if peak_of(job) is None:
        return job
    samples, mode = micro_batch_samples(job), FakeTensorMode(allow_non_fake_inputs=True)
    flops = 0.0
    with contextlib.suppress(Exception):  # whatever a user's model does that a fake tensor cannot
        model, batch = fake_model(job, mode), fake_micro_batch(job, mode)
        with torch.no_grad(), uncompiled(), mode, FlopCounterMode(display=False) as counter:
            forward_batch(job, model, batch)
        flops = _PASSES * counter.get_total_flops() / max(1, count_targets(job.task.train_data, samples))
    return dataclasses.replace(job, flops_per_target=flops)
