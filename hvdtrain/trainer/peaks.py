"""What GPUs can do at most, as their makers say."""

from __future__ import annotations

import torch

from hvdtrain.settings import Precision

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


def product_type(precision: Precision) -> torch.dtype:
    """Return the type that most products of a training are computed in."""
    is_16_bit = precision in ("bf16", "fp16", "bf16-true")
    return {"fp16": torch.float16, "fp64": torch.float64}.get(precision, torch.bfloat16 if is_16_bit else torch.float32)


def data_sheet_peak(name: str, dtype: torch.dtype) -> float | None:
    """Return the peak in FLOP/s of products of this type; None where no data sheet tells it of this very card."""
    if dtype == torch.float16:
        return (PEAKS_16_BIT | PEAKS_FP16).get(name)
    return PEAKS_16_BIT.get(name) if dtype == torch.bfloat16 else None


def is_part_of_card(name: str) -> bool:
    """Return whether a card's name is that of an instance of it (MIG), whose peak no data sheet tells."""
    return " MIG " in name
