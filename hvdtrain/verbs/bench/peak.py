"""What a device could do at most: as its maker says, or as a matrix product shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hvdtrain.models.linear import linear
from hvdtrain.settings import Precision
from hvdtrain.trainer.device_clock import finish
from hvdtrain.trainer.peaks import data_sheet_peak, is_part_of_card, product_type
from hvdtrain.verbs.phase_clock import seconds_of


def peak_flops(device: torch.device, precision: Precision) -> tuple[float, str]:
    """Return the device's peak in FLOP/s for this precision, and where the number is from.

    That of a known GPU for 16-bit types is looked up; else the best rate of some large matrix products, by the
    threads of this process.
    """
    dtype = product_type(precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = data_sheet_peak(name, dtype)
    if peak is not None:
        return peak, f"data sheet of {name}"
    of_part = f", as {name} is a part of a card" if is_part_of_card(name) else ""
    return _measured(device, dtype), f"measured by a matrix product{of_part}"


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for product in (F.linear, linear):  # on CPUs, two libraries
        for _ in range(6):
            finish(device)
            times.append(seconds_of(lambda multiply=product: multiply(a, b), device))  # type: ignore[misc]
    return 2 * n**3 / min(times)
