"""Floating-point operations of a step, and what a device could do at most."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from hvdtrain.models.linear import linear
from hvdtrain.settings import Precision
from hvdtrain.trainer import Job
from hvdtrain.trainer.state import Training
from hvdtrain.trainer.step import forward_sums
from hvdtrain.verbs.phase_clock import finish, seconds_of

# Dense peak in FLOP/s of 16-bit matrix products without sparsity, from the makers' data sheets.
PEAKS_16_BIT = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A40": 150e12, "A10": 125e12,
    "V100": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip

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
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward_sums(job, training.model, samples[positions])
    return float(3 * counter.get_total_flops()) / len(positions) * len(samples)


def peak_flops(device: torch.device, precision: Precision) -> tuple[float, str]:
    """Return the device's peak in FLOP/s for this precision, and where the number is from.

    That of a known GPU for 16-bit types is looked up; else the best rate of some large matrix products, by the
    threads of this process.
    """
    is_16_bit = precision in ("bf16", "fp16", "bf16-true")
    if device.type == "cuda" and is_16_bit:
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS_16_BIT.items():
            if known in name:
                return peak, f"data sheet of {known}"
    dtype = {"fp16": torch.float16, "fp64": torch.float64}.get(
        precision, torch.bfloat16 if is_16_bit else torch.float32
    )
    return _measured(device, dtype), "measured by a matrix product"


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for product in (F.linear, linear):  # on CPUs, two libraries
        for _ in range(6):
            finish(device)
            times.append(seconds_of(lambda multiply=product: multiply(a, b), device))  # type: ignore[misc]
    return 2 * n**3 / min(times)
