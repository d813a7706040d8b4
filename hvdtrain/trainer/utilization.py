"""What share of the devices' peak a model's own operations are: model FLOPs utilization (MFU, arXiv:2204.02311)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from hvdtrain.trainer.component import Component
from hvdtrain.trainer.peaks import data_sheet_peak, product_type
from hvdtrain.trainer.values import count_targets

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training

METRIC = "throughput/mfu"


class Peak(NamedTuple):
    """What a rank's device can do at most."""

    flops: float
    """Operations a second."""
    source: str
    """Where the number is from."""


def peak_of(job: Job) -> Peak | None:
    """Return the peak of a rank's device; None where neither a setting nor a data sheet tells it."""
    given, device = job.config.log.peak_tflops, job.world.device
    if given is not None:
        return Peak(given * 1e12, "--log.peak-tflops")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = data_sheet_peak(name, product_type(job.config.train.precision))
    return None if known is None else Peak(known, f"data sheet of {name}")


class Utilization(Component):
    """Logs MFU in each line, from the operations that were counted before the run began and the time of its steps."""

    name = "utilization"

    def __init__(self, job: Job, peak: Peak, flops_per_target: float) -> None:
        self._job, self._flops_per_target = job, flops_per_target
        self._peak_of_all = peak.flops * job.world.size
        if flops_per_target:
            self.about = f"MFU:        of {peak.flops / 1e12:,.4g} TFLOP/s a rank ({peak.source})"
        else:
            self.about = "MFU:        not logged: the model's operations cannot be counted without computing them"

    @classmethod
    def of(cls, job: Job) -> Utilization | None:
        """Return one where the operations were to be counted: `flops.with_flops`."""
        peak = None if job.flops_per_target is None else peak_of(job)
        return cls(job, peak, job.flops_per_target or 0.0) if peak is not None else None

    def metrics(self, training: Training) -> dict[str, float]:
        """Return the share of the peak in the steps since the last line; the last of them stands for all."""
        if not self._flops_per_target or training.figures.step_s <= 0:
            return {}
        targets = count_targets(self._job.task.train_data, self._job.order.global_batch(training.step - 1))
        return {METRIC: self._flops_per_target * targets / training.figures.step_s / self._peak_of_all}
