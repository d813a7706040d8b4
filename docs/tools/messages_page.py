"""The sentences of hvdtrain's errors, read from where they are raised.

A message is shown as it stands in the source; `…` stands for what is filled in.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "hvdtrain"
_FILLED = "…"


@dataclass(frozen=True)
class Message:
    """One place that makes an error."""

    file: str
    """Its path in the package, such as data/text/chat.py."""
    line: int
    error: str
    """The name of its class."""
    texts: tuple[str, ...]
    """What it may say; none where it only passes on what another error says."""


@functools.cache
def error_names() -> frozenset[str]:
    """Return the names of the classes of errors that hvdtrain raises on purpose."""
    names = {"HvdtrainError", "SetupError"}
    for node in ast.parse((PACKAGE / "errors.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base) in names for base in node.bases):
            names.add(node.name)
    return frozenset(names)


@functools.cache
def all_messages() -> tuple[Message, ...]:
    """Return every place in the package that makes one of these errors, by file and line."""
    return tuple(message for path in sorted(PACKAGE.rglob("*.py")) for message in _in_file(path))


def messages_of(areas: list[str], all_areas: list[str]) -> list[Message]:
    """Return the messages of files that belong to one of `areas`: paths of files or folders, the longest wins."""

    def owner(file: str) -> str:
        fitting = [area for area in all_areas if file == area or file.startswith(f"{area}/")]
        return max(fitting, key=len, default="")

    return [message for message in all_messages() if owner(message.file) in areas]


def listed(messages: list[Message]) -> str:
    """Return messages as a Markdown list, equal ones once."""
    lines = {text: message.error for message in messages for text in message.texts}
    return "\n".join(f"- {_code(text)} ({error})" for text, error in lines.items())


def _code(text: str) -> str:
    ticks = "``" if "`" in text else "`"
    return f"{ticks} {text} {ticks}" if "`" in text else f"{ticks}{text}{ticks}"


def _in_file(path: Path) -> Iterator[Message]:
    tree = ast.parse(path.read_text())
    module = _Module(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) in error_names():
            parts = [module.texts_of(argument, {}) for argument in node.args]
            texts = {_one_line(text) for part in parts for text in part}
            said = tuple(sorted(text for text in texts if re.search(r"[a-z]{2}", text)))
            yield Message(str(path.relative_to(PACKAGE)), node.lineno, _name(node.func), said)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == "unused":
            for reason in _reasons(function):
                said = tuple(f"{_FILLED} has no effect: {_one_line(text)}" for text in module.texts_of(reason, {}))
                yield Message(str(path.relative_to(PACKAGE)), reason.lineno, "ConfigError", said)


def _reasons(unused: ast.FunctionDef) -> Iterator[ast.expr]:
    """Yield why settings have no effect: the second of each pair that a section's `unused` yields."""
    for node in ast.walk(unused):
        pair = node.value if isinstance(node, ast.Yield) else node.elt if isinstance(node, ast.GeneratorExp) else None
        if isinstance(pair, ast.Tuple) and not isinstance(pair.elts[1], ast.Name):
            yield pair.elts[1]


class _Module:
    """Finds out what an expression of a module may say."""

    def __init__(self, tree: ast.Module) -> None:
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.constants = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def texts_of(self, node: ast.expr, seen: dict[str, bool]) -> list[str]:
        """Return the texts that an expression may be: of both branches, of constants and of functions here."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            texts = [""]
            for part in node.values:
                value = part.value if isinstance(part, ast.FormattedValue) else part
                has_few = isinstance(value, ast.Constant | ast.IfExp)
                parts = self.texts_of(value, seen) if has_few else [_FILLED]
                texts = [text + more for text in texts for more in parts]
            return texts
        if isinstance(node, ast.BinOp):
            left, right = self.texts_of(node.left, seen), self.texts_of(node.right, seen)
            return [a + b for a in left for b in right]
        if isinstance(node, ast.IfExp):
            return self.texts_of(node.body, seen) + self.texts_of(node.orelse, seen)
        name = _name(node.func) if isinstance(node, ast.Call) else _name(node)
        if name in seen:
            return [_FILLED]
        seen = {**seen, name: True}
        if isinstance(node, ast.Call) and name in self.functions:
            returns = [n.value for n in ast.walk(self.functions[name]) if isinstance(n, ast.Return) and n.value]
            return [text for value in returns for text in self.texts_of(value, seen)]
        if isinstance(node, ast.Name) and name in self.constants:
            return self.texts_of(self.constants[name], seen)
        return [_FILLED]


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
