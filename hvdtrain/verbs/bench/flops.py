"""Floating-point operations of a step, and what a device could do at most."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from hvdtrain.models.compilation import uncompiled
from hvdtrain.models.linear import linear
from hvdtrain.settings import Precision
from hvdtrain.trainer import Job
from hvdtrain.trainer.device_clock import finish
from hvdtrain.trainer.state import Training
from hvdtrain.trainer.step import forward_sums
from hvdtrain.verbs.phase_clock import seconds_of

# Dense peak in FLOP/s of 16-bit matrix products that are added in fp32, without sparsity, from the makers' data sheets,
# by the names that the driver gives. By whole names: an H100 NVL is no H100 SXM, an A10G no A10.
PEAKS_16_BIT = {
    "NVIDIA GB200": 2500e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 990e12,
    "NVIDIA GH200 120GB": 990e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H20": 148e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA A40": 150e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA RTX A6000": 155e12,
    "NVIDIA RTX 6000 Ada Generation": 364e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}
# Whose fast products are in fp16 only.
PEAKS_FP16 = {
    "Tesla T4": 65e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "Tesla V100-PCIE-16GB": 112e12,
    "Tesla V100-PCIE-32GB": 112e12,
}

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
    return float(3 * counter.get_total_flops()) / len(positions) * len(samples)


def peak_flops(device: torch.device, precision: Precision) -> tuple[float, str]:
    """Return the device's peak in FLOP/s for this precision, and where the number is from.

    That of a known GPU for 16-bit types is looked up; else the best rate of some large matrix products, by the
    threads of this process.
    """
    is_16_bit = precision in ("bf16", "fp16", "bf16-true")
    dtype = {"fp16": torch.float16, "fp64": torch.float64}.get(
        precision, torch.bfloat16 if is_16_bit else torch.float32
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = data_sheet_peak(name, dtype)
    if peak is not None:
        return peak, f"data sheet of {name}"
    of_part = f", as {name} is a part of a card" if is_part_of_card(name) else ""
    return _measured(device, dtype), f"measured by a matrix product{of_part}"


def data_sheet_peak(name: str, dtype: torch.dtype) -> float | None:
    """Return the peak in FLOP/s of products of this type; None where no data sheet tells it of this very card."""
    if dtype == torch.float16:
        return (PEAKS_16_BIT | PEAKS_FP16).get(name)
    return PEAKS_16_BIT.get(name) if dtype == torch.bfloat16 else None


def is_part_of_card(name: str) -> bool:
    """Return whether a card's name is that of an instance of it (MIG), whose peak no data sheet tells."""
    return " MIG " in name


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for product in (F.linear, linear):  # on CPUs, two libraries
        for _ in range(6):
            finish(device)
            times.append(seconds_of(lambda multiply=product: multiply(a, b), device))  # type: ignore[misc]
    return 2 * n**3 / min(times)
