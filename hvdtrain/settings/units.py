"""Durations and bytes as people write and read them."""

from __future__ import annotations

import math
import re

from hvdtrain.errors import ConfigError

_LONGEST = 40
_UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def shortened(text: str, most: int = 80) -> str:
    """Return a text for a message, cut where it is long."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def parse_duration(text: str) -> float:
    """Return the seconds of `3h50m`, `90s`, `1d` or a plain number of seconds.

    Raises:
        ConfigError: it is none of these.
    """
    parts = re.findall(r"([0-9]+)([dhms])", text)
    if len(text) > _LONGEST or not (
        re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or (parts and "".join(map("".join, parts)) == text)
    ):
        raise ConfigError(f"'{shortened(text)}' is no duration: write it as 3h50m, 90s or 1d12h")
    if not parts:
        return float(text)
    return float(sum(int(number) * _UNITS_S[unit] for number, unit in parts))


def duration(seconds: float) -> str:
    """Return seconds as `45s`, `3m20s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def in_units(num_bytes: float) -> str:
    """Return bytes as a person reads them."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = 0 if num_bytes < 1 else min(int(math.log2(num_bytes)) // 10, len(units) - 1)
    value = num_bytes / 1024**power
    return f"{value:.0f} {units[power]}" if value >= 100 else f"{value:.3g} {units[power]}"
