"""Settings to and from plain values, such as TOML and a command line hold, and the words for what is wrong with one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from hvdtrain.errors import ConfigError
from hvdtrain.settings.fields import alternatives, check_range, fields_of, hints_of, is_optional, words_for
from hvdtrain.settings.paths import expanded
from hvdtrain.settings.synonyms import advice, meant
from hvdtrain.settings.units import shortened

T = TypeVar("T")

# How alike a wrong and a right name must be, and how many names may be listed.
_LIKE, _FEW = 0.75, 16
# Longer words are like no other, and take long to compare; more words are no help.
_LONGEST_WORD, _MOST_WORDS = 200, 40


class Words(tuple[str, ...]):
    """The words that follow a flag on a command line: a value whose type only its setting knows."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """Where values come from, and how a setting is written there."""

    file: str = ""
    """Name of a file; empty for the command line."""

    def name(self, setting: str) -> str:
        """Return how messages call a setting."""
        return f"{self.file}: {setting}" if self.file else f"--{setting.replace('_', '-')}"

    def unknown(self, setting: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> ConfigError:
        """Return the error for a setting that there is not; names the one that is meant, or the nearest of `known`.

        What is meant may also be one of those `elsewhere`, in other sections.
        """
        what = (
            f"{self.file}: there is no setting '{setting}'" if self.file else f"there is no flag '{self.name(setting)}'"
        )
        return ConfigError(f"{shortened(what, 160)}{self._hint(setting, [*known], [*elsewhere])}")

    def _hint(self, setting: str, known: list[str], elsewhere: list[str]) -> str:
        def written(name: str) -> str:
            return name if self.file else self.name(name)

        found = meant(setting, known) or meant(setting, elsewhere)
        if found:
            return f"; did you mean {' or '.join(repr(written(name)) for name in found)}?"
        if advice(setting):
            return f": {advice(setting)}"
        close = difflib.get_close_matches(setting[:_LONGEST_WORD], known, n=1, cutoff=_LIKE)
        if close:
            return f"; did you mean '{written(close[0])}'?"
        if self.file or len(known) <= _FEW:
            return f"; known are {', '.join(map(written, sorted(known)))}"
        return "; all of them: the same command with --help-all"


NONE = "none"
"""How a command line and a file say that a setting is not given; TOML has no word for it."""


def to_dict(config: Any, none: str | None = None) -> dict[str, Any]:
    """Turn a configuration into nested plain values that TOML can hold.

    `None` is left out, or written as `none`: a recipe's default may be another, and what loads the values must know.
    """
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    filled = {name: none if value is None else _plain(value, none) for name, value in values.items()}
    return {name: value for name, value in filled.items() if value is not None}


def _plain(value: Any, none: str | None = None) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value, none)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    # Subclasses such as numpy.float64 and enums of texts stand for what they are made of.
    kinds: tuple[Any, ...] = (bool, int, float, str)
    for kind in kinds:
        if isinstance(value, kind):
            return value if type(value) is kind else kind.__new__(kind, value)
    return value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, by full names: `{"train": {"steps": 5}}` as `{"train.steps": 5}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


class MisfitError(ConfigError):
    """Settings of one section that are each right by themselves, and do not fit together."""

    section = ""
    """Its name; empty for that of a whole recipe."""


def merge(config: T, values: Mapping[str, Any], source: str | Source = "the configuration", prefix: str = "") -> T:
    """Return `config` with `values` (nested, as from TOML) in place of its own.

    Args:
        config: a dataclass instance, the defaults.
        values: what to replace; dashes in keys count as underscores.
        source: where the values come from, for messages.
        prefix: the section that `config` is, for messages.

    Raises:
        ConfigError: an unknown key (names the nearest real one), a value of the wrong type, or one out of its range.
        MisfitError: values do not fit together.
    """
    source = Source(source) if isinstance(source, str) else source
    hints = hints_of(type(config))
    items = {item.name: item for item in dataclasses.fields(config)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for given, value in values.items():
        key, name = given.replace("-", "_"), f"{prefix}{given}"
        if key not in hints:
            everywhere = [] if prefix else [setting for setting, _, _ in fields_of(config)]
            raise source.unknown(name, [f"{prefix}{known}" for known in hints], everywhere)
        current = getattr(config, key)
        if not dataclasses.is_dataclass(current):
            changes[key] = convert(value, hints[key], source.name(name))
            check_range(items[key], source.name(name), changes[key])
        elif isinstance(value, Mapping):
            changes[key] = merge(current, value, source, f"{name}.")
        else:
            raise ConfigError(_says_section(source, name, value))
    try:
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    except ConfigError as error:
        is_complete = not source.file or source.file in str(error)
        refusal = MisfitError(str(error) if is_complete else f"{source.file}: {error}")
        refusal.section = prefix.removesuffix(".")
        raise refusal from error


def _says_section(source: Source, name: str, value: Any) -> str:
    if not source.file:
        return f"--{name} is a section: settings are written --{name}.setting VALUE"
    what = f"[[{name}]] is a list of sections" if isinstance(value, list) else f"'{name}' is a section"
    return f"{source.file}: {what}: write [{name}] above its settings"


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Say `; did you mean '...'?` for the known word most like `word`, or name them all if they are few."""
    known = sorted(known)
    close = difflib.get_close_matches(word[:_LONGEST_WORD], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{prefix}{close[0]}'?"
    return f"; known are {', '.join(known)}" if 0 < len(known) <= _MOST_WORDS else ""


def convert(value: Any, hint: Any, name: str) -> Any:
    """Return a plain value, or the words of a command line, as a field of type `hint` holds it.

    An int serves as a float, a string as a path.

    Raises:
        ConfigError: it is of another type.
    """
    if isinstance(value, Words):
        return _from_words(value, hint, name)
    if is_optional(hint) and (value is None or (isinstance(value, str) and value in (NONE, "None"))):
        return None
    kinds = alternatives(hint)
    kind = next((kind for kind in kinds if type(value) is kind), kinds[0])
    origin = typing.get_origin(kind)
    if origin is Literal:
        return _choice(value, kind, name)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} is {value!r}, but must be a list")
        return tuple(convert(item, typing.get_args(kind)[0], name) for item in value)
    if kind is float and type(value) is int:
        return _float(value, name)
    if kind is Path and isinstance(value, str | Path):
        return _path(str(value), name)
    if isinstance(kind, type) and (isinstance(value, bool) != (kind is bool) or not isinstance(value, kind)):
        raise ConfigError(f"{name} is {_shown(value)}, but must be of type {kind.__name__}")
    return value


def _from_words(words: Words, hint: Any, name: str) -> Any:
    *others, kind = alternatives(hint)
    if typing.get_origin(kind) is tuple:
        return tuple(_from_text(word, typing.get_args(kind)[0], name) for word in words)
    if kind is bool and not words:
        return True
    if not words:
        raise ConfigError(f"{name} needs a value: {words_for(hint)}")
    if len(words) > 1:
        raise ConfigError(f"'{shortened(words[1])}' belongs to no flag: {name} takes one value")
    if is_optional(hint) and words[0] in (NONE, "None"):
        return None
    for other in others:  # of int | str, a number is the former
        with contextlib.suppress(ConfigError):
            return _from_text(words[0], other, name)
    return _from_text(words[0], kind, name)


def _from_text(text: str, kind: Any, name: str) -> Any:
    if typing.get_origin(kind) is Literal:
        return _choice(text, kind, name)
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is bool:
        raise ConfigError(f"'{shortened(text)}' belongs to no flag: {name} alone switches it on")
    if kind is Path:
        return _path(text, name)
    parse: Callable[[str], Any] = kind
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{name} {_shown(text)} must be {words_for(kind)}") from error


def _float(value: int, name: str) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(f"{name} must be a number that a float can hold") from error


def _path(text: str, name: str) -> Path:
    # Path("") is the present directory, which nobody means who writes nothing.
    if not text:
        raise ConfigError(f"{name} is empty: give a path, or leave it out")
    return expanded(text, name)


def _choice(value: Any, kind: Any, name: str) -> Any:
    choices = typing.get_args(kind)
    if value not in choices:
        raise ConfigError(f"{name} is {_shown(value)}, but must be one of {', '.join(map(repr, choices))}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {int(value.bit_length() * math.log10(2)) + 1} digits"
    return shortened(repr(value))


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"train.steps": 5}` as `{"train": {"steps": 5}}`.

    Raises:
        ConfigError: a name is used as a setting and as a section.
    """
    result: dict[str, Any] = {}
    for name, value in dotted.items():
        *sections, last = name.split(".")
        inner = result
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--{section} is a setting, not a section: --{name} means nothing")
        if isinstance(inner.get(last), dict):
            raise ConfigError(f"--{last} is a section: settings are written --{last}.setting VALUE")
        inner[last] = value
    return result


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"train": {"steps": 5}}` as `{"train.steps": 5}`; dashes become underscores."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + key.replace("-", "_")
        flat.update(flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat
