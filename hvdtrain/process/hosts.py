"""A launcher's command: the hosts it names, those of them that answer, and the command without the others."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hvdtrain.errors import ConfigError

_HOSTS = ("-H", "--host", "--hosts", "-host")
_HOSTFILES = ("-hostfile", "--hostfile", "--host-file", "-machinefile", "--machinefile")
_RANKS = ("-np", "-n", "--np", "-c")
_LARGEST_HOSTFILE_BYTES = 1 << 20


def restricted(command: Sequence[str], hosts: dict[str, int], lost: set[str]) -> list[str]:
    """Return the command without the lost hosts, its ranks no more than the slots that are left.

    A global batch size in the command must divide among the ranks; then it is the largest number that does.

    Args:
        command: the launcher's words.
        hosts: slots of each host that the command names.
        lost: those that do not answer.
    """
    left = {host: slots for host, slots in hosts.items() if host not in lost}
    words, slots = list(command), sum(left.values())
    position, _ = _option(words, (*_HOSTS, *_HOSTFILES))
    if not lost or position is None:
        return words
    width = 1 if "=" in words[position] else 2
    words[position : position + width] = ["-H", ",".join(f"{host}:{count}" for host, count in left.items())]
    number, asked = _option(words, _RANKS)
    ranks = min(slots, _number(asked) or slots)
    _, batch = _option(words, ("--train.global-batch-size",))
    size = _number(batch)
    if size:
        small = [n for n in range(1, math.isqrt(size) + 1) if size % n == 0]
        ranks = max(n for n in (*small, *(size // n for n in small)) if n <= ranks)
    if number is not None:
        if "=" in words[number]:
            words[number] = f"{words[number].partition('=')[0]}={ranks}"
        else:
            words[number + 1] = str(ranks)
    return words


def named_hosts(command: Sequence[str]) -> dict[str, int]:
    """Return the hosts that a launcher's command names, with their slots (1 where none are given).

    Raises:
        ConfigError: a host file cannot be read, or a name cannot be a host's.
    """
    _, listed = _option(command, _HOSTS)
    if listed:
        return _checked({host: slots for host, slots in map(_entry, listed.split(",")) if host}, "the command")
    _, file = _option(command, _HOSTFILES)
    return _checked(_in_file(Path(file)), f"the host file {file}") if file else {}


def _in_file(path: Path) -> dict[str, int]:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_HOSTFILE_BYTES + 1) if path.is_file() else b"\0"
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the host file {path} cannot be read: {why}") from error
    if len(data) > _LARGEST_HOSTFILE_BYTES or b"\0" in data:
        raise ConfigError(f"the host file {path} is no list of hosts: write a host a line, as in 'node1 slots=4'")
    hosts = {}
    for line in data.decode(errors="replace").splitlines():
        words = line.partition("#")[0].split()
        if words:
            host, slots = _entry(words[0])
            given = re.search(r"slots\s*=\s*([0-9]{1,9})\b", line)
            hosts[host] = int(given.group(1)) if given else slots
    return hosts


def _entry(text: str) -> tuple[str, int]:
    host, _, slots = text.strip().partition(":")
    number = _number(slots)
    return host, 1 if number is None else number


def _checked(hosts: dict[str, int], where: str) -> dict[str, int]:
    """Raise ConfigError for what is no host's name: ssh would read "-oProxyCommand=..." as an option."""
    for host in hosts:
        if not re.fullmatch(r"[A-Za-z0-9_\[][A-Za-z0-9_.:%@\[\]-]{0,254}", host):
            raise ConfigError(f"{where} names {host[:80]!r}, which can be no host: letters, digits, '.', '-' and '_'")
    return {host: slots for host, slots in hosts.items() if slots > 0}


def _number(text: str | None) -> int | None:
    """Return a whole number of up to nine digits, None for anything else."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,9}", text) else None


def lost_hosts(hosts: Sequence[str], ssh: Sequence[str]) -> set[str]:
    """Return those that do not answer `ssh HOST true` within some seconds; this host itself is never asked."""
    here = {"localhost", "127.0.0.1", os.uname().nodename, os.uname().nodename.split(".")[0]}

    def answers(host: str) -> bool:
        command = [*ssh, "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", host, "true"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20).returncode == 0
        return False

    asked = [host for host in hosts if host not in here]
    with ThreadPoolExecutor(max_workers=32) as pool:
        return {host for host, ok in zip(asked, pool.map(answers, asked), strict=True) if not ok}


def run_directory(command: Sequence[str]) -> Path:
    """Return the command's --run-dir.

    Raises:
        ConfigError: it has none: each start would begin another run.
    """
    _, directory = _option(command, ("--run-dir",))
    if not directory:
        raise ConfigError("the command needs --run-dir DIR: without one, each start would begin a new run")
    return Path(directory)


def _option(words: Sequence[str], names: Sequence[str]) -> tuple[int | None, str | None]:
    """Return the position and the value of the first of some options, written `--name value` or `--name=value`."""
    for position, word in enumerate(words):
        name, is_joined, value = word.partition("=")
        if name in names and is_joined:
            return position, value
        if word in names and position + 1 < len(words):
            return position, words[position + 1]
    return None, None
