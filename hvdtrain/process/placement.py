"""How many ranks run on which hosts, and the launcher's command for them. Standard library only."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import ConfigError, LaunchError, counted
from hvdtrain.process.hosts import HOSTFILES, HOSTS, RANKS, option, whole_number
from hvdtrain.process.session import horovodrun_options

LAUNCHERS = ("horovodrun", "mpirun", "mpiexec", "orterun", "prterun", "mpiexec.hydra")
PLACES = ("{ranks}", "{hosts}", "{host_names}", "{num_hosts}")
"""What a command may hold: the number of ranks, `node1:2,node2:1`, `node1,node2`, and how many hosts these are."""
_MOST_SHOWN = 8


@dataclass(frozen=True)
class Batch:
    """What must come out even: `ranks` times `unit` divides the global batch."""

    total: int | None = None
    """Samples of all ranks in a step; None: not known, and any number of ranks will do."""
    unit: int = 1
    """Samples, or steps of accumulation, that the command gives a rank."""

    def most_ranks(self, limit: int) -> int:
        """Return the largest number of ranks, up to `limit`, among which the global batch divides; at least 1."""
        if self.total is None or self.total % self.unit:
            return limit
        size = self.total // self.unit
        small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
        return max(n for n in (*small, *(size // n for n in small)) if n <= max(limit, 1))


@dataclass(frozen=True)
class Placement:
    """Ranks on hosts."""

    hosts: Mapping[str, int]
    """Ranks of each host, in the order in which they are counted."""
    slots: int
    """Of these hosts and of those that have no rank."""

    @property
    def ranks(self) -> int:
        """Return how many there are."""
        return sum(self.hosts.values())

    def __str__(self) -> str:
        shown = [f"{host} ({ranks})" for host, ranks in self.hosts.items()]
        more = f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
        return f"{counted(self.ranks, 'rank')} on {', '.join(shown[:_MOST_SHOWN])}{more}"


def place(slots: Mapping[str, int], most: int | None, asked: int | None, batch: Callable[[], Batch]) -> Placement:
    """Return as many ranks as can be used, host after host.

    Args:
        slots: of each host, in the order in which hosts are filled.
        most: ranks; None: as many as there are slots.
        asked: the number that the command itself names: it is taken as it is where there are slots for it.
        batch: returns what the ranks must divide; asked only where that matters.
    """
    total = sum(slots.values())
    limit = min(total, total if most is None else most)
    left = limit if limit == asked else min(limit, batch().most_ranks(limit))
    hosts = {}
    for host, count in slots.items():
        if left > 0:
            hosts[host] = min(count, left)
            left -= hosts[host]
    return Placement(hosts, total)


def asked_ranks(command: Sequence[str]) -> int | None:
    """Return the number of ranks that a launcher's command names; None where it names none."""
    return _ranks_option(command)[1]


def is_placeable(command: Sequence[str]) -> bool:
    """Return whether a command leaves hosts or ranks to be filled in."""
    return any(name in word for word in command for name in PLACES)


def placed(command: Sequence[str], placement: Placement) -> list[str]:
    """Return the command that starts these ranks.

    `{ranks}`, `{hosts}`, `{host_names}` and `{num_hosts}` are filled in. Without any of these, a launcher's own options
    are replaced, or added; a command without a launcher is given to `horovodrun`.

    Raises:
        ConfigError: it is none of these.
        LaunchError: Horovod is not installed.
    """
    hosts = ",".join(f"{host}:{count}" for host, count in placement.hosts.items())
    if is_placeable(command):
        names, number = ",".join(placement.hosts), str(len(placement.hosts))
        values = dict(zip(PLACES, (str(placement.ranks), hosts, names, number), strict=True))
        return [_filled(word, values) for word in command]
    words = list(command)
    is_launcher = Path(words[0]).name in LAUNCHERS
    if is_launcher or option(words, (*HOSTS, *HOSTFILES))[0] is not None:
        _set_ranks(words, placement.ranks, is_launcher)
        position, _ = option(words, (*HOSTS, *HOSTFILES))
        start, end = (1, 1) if position is None else (position, position + (1 if "=" in words[position] else 2))
        words[start:end] = ["-H", hosts]
        return words
    if training_words(words) == words:
        return [_horovodrun(), *horovodrun_options(), "-np", str(placement.ranks), "-H", hosts, *words]
    raise ConfigError(
        f"where do the ranks and hosts belong in '{' '.join(words[:4])} ...'? Write {{ranks}} and {{hosts}} there, or"
        " begin the command with horovodrun, mpirun, or python -m hvdtrain"
    )


def training_words(command: Sequence[str]) -> list[str]:
    """Return the words of `python -m hvdtrain ...` or `hvdtrain ...` in a command; none where it has none."""
    words = list(command)
    for position in range(1, len(words) - 1):
        if words[position : position + 2] == ["-m", "hvdtrain"]:
            return words[position - 1 :]
    named = (
        i
        for i, word in enumerate(words)
        if Path(word).name == "hvdtrain" and not "".join(words[i - 1 : i]).startswith("-")
    )
    first = next(named, None)
    return [] if first is None else words[first:]


def launcher_words(command: Sequence[str]) -> list[str]:
    """Return the words before the program that a launcher starts."""
    training = training_words(command)
    if training:
        return list(command[: len(command) - len(training)])
    programs = (i for i, word in enumerate(command) if i and Path(word).name.startswith(("python", "sh", "bash")))
    return list(command[: next(programs, len(command))])


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _set_ranks(words: list[str], ranks: int, is_launcher: bool) -> None:
    position, _ = _ranks_option(words)
    if position is None:
        words[1:1] = ["-np", str(ranks)] if is_launcher else []
    elif "=" in words[position]:
        words[position] = f"{words[position].partition('=')[0]}={ranks}"
    else:
        words[position + 1] = str(ranks)


def _ranks_option(command: Sequence[str]) -> tuple[int | None, int | None]:
    """Return where a launcher is told how many ranks there are, and how many: `-c` and `-n` mean more than that."""
    words = launcher_words(command)
    for position in range(len(words)):
        place, value = option(words[position : position + 2], RANKS)
        number = whole_number(value)
        if place == 0 and number is not None:
            return position, number
    return None, None


def _horovodrun() -> str:
    beside = Path(sys.executable).with_name("horovodrun")
    found = str(beside) if beside.exists() else shutil.which("horovodrun")
    if found is None:
        raise LaunchError(f"ranks need Horovod, which is not installed beside {sys.executable}: run hvdtrain setup")
    return found
