r"""The values of a setting in a sweep, as they are written: `a,b,c`, or a range `LOW..HIGH`.

A comma ends a value; `\,` is a comma within one, and `\\` a backslash. A setting that holds a list takes each value as
its words, split as a shell would: `"0.3 0.6,0.5"` is a list of two and a list of one.
"""

from __future__ import annotations

import math
import random
import re
import shlex
import typing
from dataclasses import dataclass
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.settings.fields import alternatives
from hvdtrain.settings.flags import COMMAND_LINE
from hvdtrain.settings.units import shortened
from hvdtrain.settings.values import Words, convert

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(?::(\w+))?", re.ASCII)
_DIGITS = 4


@dataclass(frozen=True)
class Choices:
    """Values that are listed."""

    values: tuple[Words, ...]

    def draw(self, number: random.Random) -> Words:
        """Return one of them, each as likely as the others."""
        return number.choice(self.values)

    def corners(self) -> tuple[Words, ...]:
        """Return all of them."""
        return self.values


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, which belong to it."""

    low: float
    high: float
    is_log: bool
    is_whole: bool

    def draw(self, number: random.Random) -> Words:
        """Return a number of four digits, evenly between the bounds, or evenly in its logarithm."""
        part = number.random()
        if self.is_log:
            drawn = math.exp(math.log(self.low) + part * (math.log(self.high) - math.log(self.low)))
        else:
            drawn = self.low + part * (self.high - self.low)
        return self.words(drawn)

    def words(self, value: float) -> Words:
        """Return a number of this range as a command line has it."""
        short = round(value) if self.is_whole else float(f"{value:.{_DIGITS}g}")
        return Words((repr(min(max(short, self.low), self.high)),))

    def corners(self) -> tuple[Words, ...]:
        """Return the bounds."""
        return (Words((repr(self.low),)), Words((repr(self.high),)))


Values = Choices | Range


def read_values(words: Words, hint: Any, name: str, has_ranges: bool) -> Values:
    """Return the values that a flag's words stand for; of one value, or of none as of a switch, `Choices` of one.

    Args:
        words: what follows the flag.
        hint: the type of the setting.
        name: the setting.
        has_ranges: whether values are drawn; else a range is refused.

    Raises:
        ConfigError: a value that the setting cannot have, one that is listed twice, or a range that is none.
    """
    flag = COMMAND_LINE.name(name)
    is_list = typing.get_origin(alternatives(hint)[0]) is tuple
    if len(words) == 1:
        found = _range(words[0], hint, flag)
        if found is not None and not has_ranges:
            raise ConfigError(f"{flag} {words[0]} is a range, which --sweep.random N draws N values from; list values")
        if found is not None:
            return found
    if not words:
        return Choices((words,))
    if len(words) > 1:
        if not is_list or any(len(split(word)) > 1 for word in words):
            raise ConfigError(_one_word(flag, is_list))
        values = [Words(part for word in words for part in split(word))]
    else:
        values = [_words_of(part, is_list, flag) for part in split(words[0])]
    plain = [convert(value, hint, flag) for value in values]
    for place, value in enumerate(plain):
        if value in plain[:place]:
            raise ConfigError(f"{flag} lists {shortened(' '.join(values[place]))} twice")
    return Choices(tuple(values))


def split(word: str) -> list[str]:
    r"""Return what commas separate; `\,` is a comma that does not, `\\` a backslash."""
    parts, part = [], ""
    for token in re.findall(r"\\[,\\]|.", word, re.DOTALL):
        if token == ",":
            parts.append(part)
            part = ""
        else:
            part += token[1:] if len(token) > 1 else token
    return [*parts, part]


def joined(value: Words, is_list: bool) -> str:
    """Return a value as `split` and the rules of lists read it."""
    text = shlex.join(value) if is_list else "".join(value)
    return text.replace("\\", "\\\\").replace(",", "\\,")


def _words_of(part: str, is_list: bool, flag: str) -> Words:
    if not is_list:
        return Words((part,))
    try:
        return Words(shlex.split(part))
    except ValueError as error:
        raise ConfigError(
            f"{flag} {shortened(part)!r} has a quotation mark too few: a value is a list of words"
        ) from error


def _one_word(flag: str, is_list: bool) -> str:
    if is_list:
        return f'{flag}: several lists stand in one word, as in {flag} "0.3 0.6,0.5"; a comma within a value is \\,'
    return f"{flag}: several values stand in one word, as in {flag} a,b; a comma within a value is \\,"


def _range(word: str, hint: Any, flag: str) -> Range | None:
    """Return the range that a word is, of a setting that can be a number; None where it is a value."""
    kinds = alternatives(hint)
    match = _RANGE.fullmatch(word)
    if match is None or not {int, float} & {*kinds}:
        return None
    kind: Any = int if int in kinds else float
    low, high = (convert(Words((text,)), kind, flag) for text in match.group(1, 2))
    scale = match[3] or "log"
    if scale not in ("log", "linear"):
        raise ConfigError(f"{flag} {word}: write LOW..HIGH, or LOW..HIGH:linear")
    if not low < high:
        raise ConfigError(f"{flag} {word}: the lower bound comes first, and the other is greater")
    if scale == "log" and low <= 0:
        raise ConfigError(f"{flag} {word}: there is no logarithm of {low}; write LOW..HIGH:linear")
    return Range(low, high, scale == "log", kind is int)
