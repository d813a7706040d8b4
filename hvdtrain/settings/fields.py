"""How a setting is declared: its default, its range and what it may be, in one place, the field.

    epochs: float | None = setting(None, above=0)

The range is checked whenever a section is made, whoever makes it: a flag, a file or a program; `--help` shows it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hvdtrain.errors import ConfigError
from hvdtrain.settings.intervals import parse_every
from hvdtrain.settings.paths import PathKind, check_path

# What torch's generators, TOML and C's long hold.
_LARGEST_INT = 2**63 - 1
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    Path: "a path",
}


def setting(
    default: Any = dataclasses.MISSING,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
    changeable: bool = False,
    path: PathKind | None = None,
    several_ranks: bool = False,
    interval: Literal["training", "time"] | None = None,
) -> Any:
    """Declare a field of a section of settings.

    Args:
        default: its value where nobody gives one; None means "not given" and is never checked.
        above: it must be greater than this.
        minimum: it must be at least this.
        below: it must be less than this.
        maximum: it must be at most this.
        changeable: a run that goes on may have another value: it does not change what a step computes.
        path: it names a file or directory of this kind.
        several_ranks: it has no effect on one rank, which is then said.
        interval: a text says how often something happens: by steps and epochs of training, or by time, too.
    """
    limits = {"above": above, "minimum": minimum, "below": below, "maximum": maximum}
    metadata = {
        "limits": {name: value for name, value in limits.items() if value is not None},
        "changeable": changeable,
        "path": path,
        "several_ranks": several_ranks,
        "interval": interval,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A group of settings. Derive from it, frozen and keyword-only; a docstring under each field becomes its help."""

    def __post_init__(self) -> None:
        check_fields(self)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield each setting that has no effect with the others as they are, and what it is for.

        One that the user has given is refused with this text: `--section.setting has no effect: ...`.
        """
        yield from ()


def hints_of(kind: type[Any]) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    return _hints_of(kind)  # type: ignore[arg-type]  # mypy 1.19 takes dataclasses for unhashable


@functools.cache
def _hints_of(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def check_fields(config: Any) -> None:
    """Check every field of a section, but not the sections in it.

    Raises:
        ConfigError: a value is of another type than its field, or out of its range.
    """
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is None or dataclasses.is_dataclass(value):
            continue
        _check_type(hints_of(type(config))[item.name], item.name, value)
        check_range(item, item.name, value)


def check_range(item: dataclasses.Field[Any], name: str, value: Any) -> None:
    """Raise ConfigError where a value is out of its field's range, or names the wrong kind of file."""
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        _check_value(item, name, number)
    kind = item.metadata.get("path")
    if kind is not None and value is not None:
        for path in numbers:
            check_path(str(path), kind, name)
    interval = item.metadata.get("interval")
    if interval is not None and value is not None:
        parse_every(name, value, seconds=interval == "time")


def _check_value(item: dataclasses.Field[Any], name: str, value: Any) -> None:
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ConfigError(f"{name} is not UTF-8 text: {value.encode('utf-8', 'backslashreplace').decode()[:80]}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} = {value} must be a finite number")
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        raise ConfigError(f"{name} = {_shortened(value)} must be at most 2^63 - 1")
    if any(_breaks(rule, limit, value) for rule, limit in item.metadata.get("limits", {}).items()):
        raise ConfigError(f"{name} = {value} must {range_of(item)}")


def _breaks(rule: str, limit: float, value: float) -> bool:
    if rule in ("above", "minimum"):
        return value < limit or (rule == "above" and value == limit)
    return value > limit or (rule == "below" and value == limit)


def range_of(item: dataclasses.Field[Any]) -> str:
    """Say a field's range, to follow "must"; empty where it has none."""
    words = {"above": "greater than", "minimum": "at least", "below": "below", "maximum": "at most"}
    limits = item.metadata.get("limits", {})
    if limits == {"minimum": 0}:
        return "not be negative"
    return "be " + " and ".join(f"{words[rule]} {_number(limit)}" for rule, limit in limits.items()) if limits else ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _shortened(value: int) -> str:
    # Python refuses to write integers of thousands of digits.
    return str(value) if value.bit_length() < 128 else f"about 2^{value.bit_length()}"


def _check_type(hint: Any, name: str, value: Any) -> None:
    """Raise ConfigError where a value given by a program is not of its field's type.

    A subclass, such as numpy.float64 of float, passes; `to_dict` makes it what it stands for.
    """
    kinds = alternatives(hint)
    if not any(is_of(kind, value) for kind in kinds):
        raise ConfigError(f"{name} = {value!r} must be {words_for(hint)}, not of type {type(value).__name__}")


def is_of(kind: Any, value: Any) -> bool:
    """Tell whether a value is of a type that stands in an annotation, unions apart; what it holds is not looked at."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin is not None:
        return isinstance(value, origin)
    if not isinstance(kind, type):
        return True  # a type that this module knows nothing of
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def alternatives(hint: Any) -> list[Any]:
    """Return the types of a union but None, or the one type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return [hint]


def is_optional(hint: Any) -> bool:
    """Tell whether a field may be None."""
    return types.NoneType in typing.get_args(hint)


def words_for(hint: Any) -> str:
    """Say what a field of this type may be."""
    return " or ".join(_words_for_one(kind) for kind in alternatives(hint))


def _words_for_one(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    return _KINDS.get(kind) or str(getattr(kind, "__name__", kind))


def fields_of(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield name (`train.steps`), field and section of every setting of a configuration, section by section."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item, config


def changeable_settings(config: Any) -> frozenset[str]:
    """Return the settings that may differ when a run goes on.

    They change when something happens, or where things lie, but not what a step computes. What a section named `data`
    says is compared by the data's fingerprint instead, the batch by its settled size.
    """
    return frozenset(
        name for name, item, _ in fields_of(config) if item.metadata.get("changeable") or name.startswith("data.")
    )
