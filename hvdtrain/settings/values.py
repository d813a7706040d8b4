"""Settings to and from plain values, such as TOML holds, and the words for what is wrong with one."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from hvdtrain.errors import ConfigError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a configuration into nested plain values that TOML can hold; `None` is left out."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is None:
            continue
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        result[item.name] = value
    return result


def merge(config: T, values: Mapping[str, Any], source: str = "the configuration", prefix: str = "") -> T:
    """Return `config` with `values` (nested, as from TOML) in place of its own.

    Args:
        config: a dataclass instance, the defaults.
        values: what to replace; dashes in keys count as underscores.
        source: where the values come from, for messages.
        prefix: the section that `config` is, for messages.

    Raises:
        ConfigError: an unknown key (names the nearest real one) or a value of the wrong type.
    """
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for given, value in values.items():
        key = given.replace("-", "_")
        if key not in hints:
            raise ConfigError(f"{source}: there is no setting '{prefix}{given}'{nearest(key, hints, prefix)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{source}: '{prefix}{given}' is a section: write [{prefix}{given}] above its settings"
                )
            changes[key] = merge(current, value, source, f"{prefix}{given}.")
        else:
            changes[key] = _convert(value, hints[key], f"{source}: '{prefix}{given}'")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def nearest(word: str, known: typing.Iterable[str], prefix: str = "") -> str:
    """Say `; did you mean '...'?` for the known word most like `word`, or name them all."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{prefix}{close[0]}'?"
    return f"; known are {', '.join(known)}"


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check a plain value against a field's type; an int serves as a float, a string as a path."""
    origin = typing.get_origin(hint)
    if value is None and types.NoneType in typing.get_args(hint):
        return None
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        return _convert(value, kinds[0], where)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{where} is {value!r}, but must be one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, typing.get_args(hint)[0], where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is None and type(value) is not hint:
        raise ConfigError(f"{where} is {value!r}, but must be of type {hint.__name__}")
    return value


def check(config: Any, name: str, holds: typing.Callable[[Any], bool], rule: str) -> None:
    """Raise ConfigError where a field of `config` is given and breaks its rule."""
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise ConfigError(f"{name} = {value} {rule}")
