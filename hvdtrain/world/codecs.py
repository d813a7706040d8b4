"""The formats that `--comm.compression` and `Averaging(compression=...)` name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hvdtrain.settings import CommConfig
from hvdtrain.settings.compression import EXACT, parse_compression
from hvdtrain.world.codec import AsTheyAre, Bf16, Codec, Fp16
from hvdtrain.world.int8 import Int8
from hvdtrain.world.powersgd import PowerSGD
from hvdtrain.world.topk import TopK

CODECS: dict[str, Callable[..., Codec]] = {
    "none": AsTheyAre,
    "fp16": Fp16,
    "bf16": Bf16,
    "int8": Int8,
    "powersgd": lambda number, **options: PowerSGD(int(number), **options),
    "topk": TopK,
}
"""By the word before the colon, if there is one; what follows it is the first argument."""


def codec_of(text: str, **options: Any) -> Codec:
    """Return a new codec: `none`, `powersgd:4`, `topk:0.01` and so on.

    `options` are those of `ErrorFeedback`, for the codecs that take them.

    Raises:
        ConfigError: there is none of this name.
    """
    name, number = parse_compression(text)
    if name in EXACT:
        return CODECS[name]()
    return CODECS[name](*([number] if number else []), **options)


def codec_for(comm: CommConfig, model: nn.Module | None = None) -> Codec:
    """Return a new codec as the settings ask for it, for the gradients of a model if one is given.

    Raises:
        ConfigError: `--comm.compression-exact` names parameters that the model does not have.
    """
    codec = codec_of(
        comm.compression,
        min_size=comm.compression_min_size,
        warmup_steps=comm.compression_warmup_steps,
        exact=comm.compression_exact,
    )
    if model is not None:
        codec.meet(model)
    return codec
