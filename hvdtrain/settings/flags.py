"""The words of a command line as settings: `--section.setting VALUE`, `--short VALUE`, `--no-flag`, `--list A B`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.settings.common import full_name, option_name
from hvdtrain.settings.fields import alternatives, check_range, fields_of, hints_of
from hvdtrain.settings.units import shortened
from hvdtrain.settings.values import Source, Words, convert

COMMAND_LINE = Source()


def read_flags(words: Sequence[str]) -> list[tuple[str, Words]]:
    """Return each flag's name as settings write it (`train.accum_steps`), and the words behind it.

    Behind `--name=value` nothing else belongs to the flag.

    Raises:
        ConfigError: a word belongs to no flag.
    """
    flags: list[tuple[str, Words]] = []
    is_open = False
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), Words((value,) if equals else ())))
            is_open = not equals
        elif is_open:
            flags[-1] = (flags[-1][0], Words((*flags[-1][1], word)))
        elif word.startswith("-"):
            flags.append((word.lstrip("-").replace("-", "_"), Words()))  # no flag has one dash: refused by its name
            is_open = True
        else:
            raise stray(word)
    return flags


def stray(word: str) -> ConfigError:
    """Return the error for a word that belongs to no flag."""
    return ConfigError(f"'{shortened(word)}' belongs to no flag: settings are written --section.setting VALUE")


def known_flags(config: Any) -> dict[str, Any]:
    """Return the type of every setting of a configuration, an instance or a class without sections, by its name."""
    if isinstance(config, type):
        return {option_name(name): hint for name, hint in hints_of(config).items()}
    return {name: hints_of(type(section))[item.name] for name, item, section in fields_of(config)}


def settle_flags(flags: Iterable[tuple[str, Words]], known: Mapping[str, Any]) -> dict[str, Words]:
    """Return the words of each setting: `--no-flag` is `flag` that is false, `--steps` is `train.steps`.

    Of a flag that is given twice the last one counts; lists are put together.

    Raises:
        ConfigError: there is a flag that `known`, the types of the settings by name, does not have.
    """
    settled: dict[str, Words] = {}
    for written, words in flags:
        name = full_name(written, known)
        *sections, last = name.split(".")
        positive = ".".join([*sections, last.removeprefix("no_")])
        if name in known:
            settled[name] = Words((*settled.get(name, ()), *words)) if _is_list(known[name]) else words
        elif positive != name and known.get(positive) is bool and not words:
            settled[positive] = Words(("false",))
        else:
            raise COMMAND_LINE.unknown(name, known)
    return settled


def _is_list(hint: Any) -> bool:
    return typing.get_origin(alternatives(hint)[0]) is tuple


def make_options(kind: type[Any], flags: Mapping[str, Words]) -> Any:
    """Return an instance of a flat dataclass from its flags. `option_name` says which field a flag belongs to.

    Raises:
        ConfigError: a value of the wrong type or out of its range, or one that is needed and missing.
    """
    hints, values = hints_of(kind), {}
    for item in dataclasses.fields(kind):
        name = option_name(item.name)
        words, flag = flags.get(name), COMMAND_LINE.name(name)
        if words is not None:
            values[item.name] = convert(words, hints[item.name], flag)
            check_range(item, flag, values[item.name])
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{flag} is missing: give it a value")
    return kind(**values)
