"""`--train.precision auto`: 16 bits where the ranks' devices are fast in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import TypeVar

import torch

from hvdtrain.models.linear import Library
from hvdtrain.models.private_attention import can_be_replaced
from hvdtrain.process.processor import cpuinfo, words_of
from hvdtrain.settings import Config, Precision, TrainConfig
from hvdtrain.world import World

T = TypeVar("T", bound=Config)

# Instructions that multiply bfloat16, as Linux calls them.
_FAST_IN_BF16 = {"avx512_bf16", "amx_bf16"}


def settle_precision(config: T, world: World) -> tuple[T, str]:
    """Return the settings with `auto` replaced by what all ranks take, and a line that says so, or "". Collective.

    It goes by what the devices are, not by a measurement, so that runs can be repeated bit by bit.
    """
    if config.train.precision != "auto":
        return config, ""
    everyone = world.all_gather_object(is_fast_in_bf16(world.device), "precision")
    chosen: Precision = "bf16" if all(everyone) else "fp32"
    train: TrainConfig = dataclasses.replace(config.train, precision=chosen)
    which = "the devices of all ranks are" if all(everyone) else "not every rank's device is"
    return dataclasses.replace(config, train=train), (
        f"precision:  {chosen}, by --train.precision auto: {which} fast in bf16"
    )


def is_fast_in_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices faster than fp32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and has_products(torch.bfloat16) and multiplies_bf16(words_of(cpuinfo(), "flags"))


def takes_onednn_attention(library: Library, device: torch.device) -> bool:
    """Return whether attention in bfloat16 on this device shall be computed by oneDNN's products."""
    return library != "torch" and device.type == "cpu" and is_fast_in_bf16(device) and can_be_replaced()


def multiplies_bf16(flags: Set[str]) -> bool:
    """Return whether an x86 processor has instructions for products of bfloat16, by Linux's names of what it has."""
    return not _FAST_IN_BF16.isdisjoint(flags)


def has_products(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies matrices of this 16-bit type on this CPU. Else torch does, by plain loops."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    is_bf16 = dtype == torch.bfloat16
    asked = torch.ops.mkldnn._is_mkldnn_bf16_supported if is_bf16 else torch.ops.mkldnn._is_mkldnn_fp16_supported
    return bool(asked())
