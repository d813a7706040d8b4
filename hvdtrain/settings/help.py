"""The text of `--help`: every setting with its docstring, range and default."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import shutil
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from hvdtrain.settings.common import COMMON, option_name, short_name
from hvdtrain.settings.fields import alternatives, fields_of, hints_of, is_optional, range_of

_VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def help_of(kind: type[Any], config: Any = None, has_all: bool = True) -> str:
    """Return the help of a flat class of options and, below it, of a configuration with its sections.

    Without `has_all`, sections show what most people set, and the last line says how to see the rest.
    """
    lines = [*_section("options", "", "", kind, None)]
    if config is not None:
        own = [item for item in dataclasses.fields(config) if not dataclasses.is_dataclass(getattr(config, item.name))]
        if own:
            lines += _section("recipe", "", "", type(config), config)
        for item in dataclasses.fields(config):
            section = getattr(config, item.name)
            if dataclasses.is_dataclass(section):
                shown = _section(item.name, _first_line(section), f"{item.name}.", type(section), section, has_all)
                title, *fields = shown
                lines += [title, *fields] if fields else []
        if not has_all:
            lines.append(f"\nall {len([*fields_of(config)])} settings: the same command with --help-all")
    return "\n".join(lines)


def docs_of(kind: type) -> dict[str, str]:
    """Return the docstrings under the fields of a dataclass, those of its bases included, each on one line."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        docs.update(_own_docs(base))
    return docs


@functools.cache
def _own_docs(kind: Any) -> dict[str, str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # built in, or no source at hand
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs: dict[str, str] = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[field.target.id] = " ".join(text.value.split())
    return docs


def _first_line(config: Any) -> str:
    return (type(config).__doc__ or "").strip().split("\n")[0]


def _section(title: str, about: str, prefix: str, kind: type[Any], config: Any, has_all: bool = True) -> Iterator[str]:
    yield f"\n{title}{': ' + about if about else ''}"
    docs, hints = docs_of(kind), hints_of(kind)
    width = min(100, shutil.get_terminal_size().columns)
    for item in dataclasses.fields(kind):
        value = getattr(config, item.name) if config is not None else item.default
        name = f"{prefix}{option_name(item.name)}"
        if dataclasses.is_dataclass(value) or not (has_all or name in COMMON):
            continue
        short = short_name(name)
        flags = ", ".join(f"--{flag}".replace("_", "-") for flag in (name, short) if flag)
        yield f"  {flags}{_value_of(hints[item.name], value)}"
        text = " ".join(filter(None, (docs.get(item.name, ""), _remark(item, hints[item.name], value))))
        yield from textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _value_of(hint: Any, value: Any) -> str:
    kind = alternatives(hint)[0]
    if kind is bool:
        return "" if value is not True else " (--no-... switches it off)"
    if typing.get_origin(kind) is Literal:
        return " " + "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f" {_VALUES.get(typing.get_args(kind)[0], 'VALUE')} ..."
    return f" {'|'.join(_VALUES.get(kind, 'VALUE') for kind in alternatives(hint))}"


def _remark(item: dataclasses.Field[Any], hint: Any, value: Any) -> str:
    """Return range and default in brackets."""
    parts = [range_of(item).replace("not be negative", "at least 0").removeprefix("be ")]
    if value is dataclasses.MISSING:
        parts.append("needed")
    elif value is None and is_optional(hint):
        parts.append("default: none")
    elif value != ():
        shown = value if not isinstance(value, bool) else "on" if value else "off"
        parts.append(f"default: {shown}")
    return f"[{'; '.join(part for part in parts if part)}]" if any(parts) else ""
