"""The reference of settings as Markdown, from the dataclasses that hold them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hvdtrain.cli import VERBS
from hvdtrain.install.__main__ import make_parser as parser_of_setup
from hvdtrain.optim.table import OPTIMIZERS, settings_class
from hvdtrain.process.supervise import make_parser as parser_of_supervise
from hvdtrain.recipes import RECIPES, load_recipe
from hvdtrain.settings import Config
from hvdtrain.settings.common import SHORT, option_name
from hvdtrain.settings.fields import alternatives, fields_of, hints_of, range_of
from hvdtrain.settings.help import docs_of

_VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def shared() -> str:
    """Return the sections that every recipe has, with their own defaults."""
    return "\n".join(_sections(Config()))


def of_recipe(name: str) -> str:
    """Return the sections in which a recipe has more than all recipes, without what they share."""
    recipe, common = load_recipe(name), Config()
    lines = []
    for item in dataclasses.fields(recipe):
        section = getattr(recipe, item.name)
        known = getattr(common, item.name, None)
        if dataclasses.is_dataclass(section) and item.name != "optim" and type(section) is not type(known):
            known_names = {field.name for field in dataclasses.fields(known)} if known is not None else set()
            lines += _entries(f"{item.name}.", type(section), type(section)(), known_names)
    return "\n".join(lines)


def of_optimizers() -> str:
    """Return what each optimizer has besides what all of them share."""
    shared_names = {field.name for field in dataclasses.fields(Config().optim)}
    lines: list[str] = []
    for name in OPTIMIZERS:
        kind = settings_class(name)
        lines += [f"**`--optim.name {name}`**", "", *_entries("optim.", kind, kind(), shared_names), ""]
    return "\n".join(lines)


def of_verb(name: str) -> str:
    """Return the options of a verb."""
    kind = VERBS[name].options
    return "\n".join(_entries("", kind, None, set()))


def of_program(name: str) -> str:
    """Return the help of `setup` or `supervise`."""
    parser = {"setup": parser_of_setup, "supervise": parser_of_supervise}[name]()
    parser.formatter_class = functools.partial(argparse.HelpFormatter, width=100)  # type: ignore[assignment]
    return parser.format_help()


def presets() -> str:
    """Return a table of the values in which recipes differ from the defaults of the settings."""
    rows = ["| recipe | sets |", "|---|---|"]
    for name in RECIPES:
        recipe = load_recipe(name)
        changed = [f"`{setting} = {_shown(value)}`" for setting, value in _changed(recipe)]
        rows.append(f"| `{name}` | {', '.join(changed)} |")
    return "\n".join(rows)


def short_names() -> str:
    """Return a table of the short names of settings."""
    rows = ["| short | is |", "|---|---|"]
    for short, settings in SHORT.items():
        names = (f"`--{name}`".replace("_", "-") for name in settings)
        rows.append(f"| `--{short.replace('_', '-')}` | {' or '.join(names)} |")
    return "\n".join(rows)


def _changed(recipe: Any) -> Iterator[tuple[str, Any]]:
    for setting, item, section in fields_of(recipe):
        value = getattr(section, item.name)
        if setting == "optim.name" or value != item.default:
            yield setting, value


def _sections(config: Any) -> Iterator[str]:
    for item in dataclasses.fields(config):
        section = getattr(config, item.name)
        about = (type(section).__doc__ or "").strip().split("\n")[0]
        yield f"**`[{item.name}]`** {about}\n"
        yield from _entries(f"{item.name}.", type(section), section, set())
        yield ""


def _entries(prefix: str, kind: type[Any], values: Any, without: set[str]) -> Iterator[str]:
    """Yield an entry of a definition list for each setting but those whose names are in `without`."""
    docs, hints = docs_of(kind), hints_of(kind)
    for item in dataclasses.fields(kind):
        value = getattr(values, item.name) if values is not None else item.default
        if item.name in without or dataclasses.is_dataclass(value):
            continue
        flag = f"--{prefix}{option_name(item.name)}".replace("_", "-")
        yield f"`{flag}{_value_of(hints[item.name])}`"
        yield f": {_escaped(docs.get(item.name, ''))} {_remarks(item, value)}".rstrip()
        yield ""


def _value_of(hint: Any) -> str:
    kind = alternatives(hint)[0]
    if kind is bool:
        return ""
    if typing.get_origin(kind) is Literal:
        return " " + "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f" {_VALUES.get(typing.get_args(kind)[0], 'VALUE')} ..."
    return f" {_VALUES.get(kind, 'VALUE')}"


def _remarks(item: dataclasses.Field[Any], value: Any) -> str:
    parts = [range_of(item).replace("not be negative", "at least 0").removeprefix("be ")]
    parts.append("needed" if value is dataclasses.MISSING else f"default: `{_shown(value)}`")
    if item.metadata.get("changeable"):
        parts.append("may change when a run goes on")
    return f"*({'; '.join(part for part in parts if part)})*"


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in "*_<>[]{}|$" else character for character in text)
