"""What `--comm.compression` may be: a name, some with a number behind a colon."""

from __future__ import annotations

import math

from hvdtrain.errors import ConfigError

EXACT = ("none", "fp16", "bf16")
"""Formats in which every number travels in every step, rounded at the most."""
APPROXIMATE = ("int8", "powersgd", "topk")
"""Formats that remember what they leave out."""
AUTO, NOTHING = "auto", "none"
"""Words of `--comm.compression-exact`; anything else of it is patterns of names."""
SPARING = ("powersgd",)
"""Formats that send the weights of a vocabulary as they are unless told otherwise: low ranks serve them worst."""
_CHOICES = (
    "none, fp16, bf16, int8, powersgd:R (R is the rank, as in powersgd:4) or topk:P (P is the share of the numbers that"
    " is sent, as in topk:0.01)"
)


def parse_compression(text: str) -> tuple[str, float]:
    """Return the name of a format and its number: powersgd's rank, topk's share, 0 for those that have none.

    Raises:
        ConfigError: there is no such format, or its number is none that it can take.
    """
    name, colon, number = text.partition(":")
    if name in (*EXACT, "int8") and not colon:
        return name, 0.0
    value = _number(number)
    if name == "powersgd" and value >= 1 and value == int(value) and value <= 1 << 16:
        return name, value
    if name == "topk" and 0 < value <= 1:
        return name, value
    raise ConfigError(f"there is no compression '{text[:80]}': choose {_CHOICES}")


def patterns_in(exact: str) -> list[str]:
    """Return the patterns of parameters' names in a value of `--comm.compression-exact`.

    Raises:
        ConfigError: one is empty.
    """
    patterns = [pattern.strip() for pattern in exact.split(",")]
    if not all(patterns):
        raise ConfigError(
            "compression_exact must be auto, none, or patterns of parameters' names between commas, as in"
            " '*embed*,lm_head.weight'"
        )
    return patterns


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
