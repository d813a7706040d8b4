"""Durations and bytes as people write and read them."""

from __future__ import annotations

import math
import re

from hvdtrain.errors import ConfigError

_UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Return the seconds of `3h50m`, `90s`, `1d` or a plain number of seconds.

    Raises:
        ConfigError: it is none of these.
    """
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+)([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ConfigError(f"'{text}' is no duration: write it as 3h50m, 90s or 1d12h")
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
