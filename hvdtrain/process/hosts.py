"""The hosts that a launcher's command names, and which hosts answer."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hvdtrain.errors import ConfigError, reason_of

HOSTS = ("-H", "--host", "--hosts", "-host", "-hosts")
HOSTFILES = ("-hostfile", "--hostfile", "--host-file", "-machinefile", "--machinefile")
RANKS = ("-np", "-n", "--np", "-c")
_RUN_DIR = ("--run-dir", "--run_dir")
_LARGEST_HOSTFILE_BYTES = 1 << 20
_SECONDS_TO_ANSWER = 20


def named_hosts(command: Sequence[str]) -> dict[str, int]:
    """Return the hosts that a launcher's command names, with their slots (1 where none are given).

    Raises:
        ConfigError: a host file cannot be read, or a name cannot be a host's.
    """
    _, listed = option(command, HOSTS)
    if listed:
        return _checked({host: slots for host, slots in map(_entry, listed.split(",")) if host}, "the command")
    _, file = option(command, HOSTFILES)
    return _checked(_in_file(Path(file)), f"the host file {file}") if file else {}


def read_bounded(path: Path) -> str:
    """Return the text of a file of hosts, which is no device and no larger than 1 MiB.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        data = b"\0"
        if not path.exists() or path.is_file() or path.is_dir():  # opening a pipe would wait for who writes
            with path.open("rb") as file:
                data = file.read(_LARGEST_HOSTFILE_BYTES + 1)
    except (OSError, ValueError) as error:
        why = reason_of(error)
        raise ConfigError(f"the host file {path} cannot be read: {why}") from error
    if len(data) > _LARGEST_HOSTFILE_BYTES or b"\0" in data:
        raise ConfigError(f"the host file {path} is no list of hosts: write a host a line, as in 'node1 slots=4'")
    return data.decode(errors="replace").removeprefix("\ufeff")


def check_name(host: str, where: str) -> None:
    """Raise ConfigError for what is no host's name: ssh would read "-oProxyCommand=..." as an option."""
    if not re.fullmatch(r"[A-Za-z0-9_\[][A-Za-z0-9_.:%@\[\]-]{0,254}", host):
        raise ConfigError(f"{where} names {host[:80]!r}, which can be no host: letters, digits, '.', '-' and '_'")


def lost_hosts(hosts: Sequence[str], ssh: Sequence[str]) -> set[str]:
    """Return those that do not answer `ssh HOST true` within some seconds; this host itself is never asked."""
    here = {"localhost", "127.0.0.1", os.uname().nodename, os.uname().nodename.split(".")[0]}

    def answers(host: str) -> bool:
        command = [*ssh, "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", host, "true"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS_TO_ANSWER)
            return done.returncode == 0
        return False

    asked = [host for host in hosts if host not in here]
    with ThreadPoolExecutor(max_workers=32) as pool:
        return {host for host, ok in zip(asked, pool.map(answers, asked), strict=True) if not ok}


def run_directory(command: Sequence[str]) -> Path:
    """Return the command's --run-dir, as the run will read it: the last one, `~` replaced.

    Raises:
        ConfigError: it has none: each start would begin another run; or none that can be.
    """
    directory: str | None = None
    for position in range(len(command)):
        place, value = option(command[position : position + 2], _RUN_DIR)
        directory = value if place == 0 else directory
    if not directory:
        raise ConfigError("the command needs --run-dir DIR: without one, each start would begin a new run")
    try:
        return Path(directory).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"--run-dir {directory[:80]}: there is no such user; for a file of this name write ./~"
        ) from error


def option(words: Sequence[str], names: Sequence[str]) -> tuple[int | None, str | None]:
    """Return the position and the value of the first of some options, written `--name value` or `--name=value`."""
    for position, word in enumerate(words):
        name, is_joined, value = word.partition("=")
        if name in names and is_joined:
            return position, value
        if word in names and position + 1 < len(words):
            return position, words[position + 1]
    return None, None


def whole_number(text: str | None) -> int | None:
    """Return a whole number of up to nine digits, None for anything else."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,9}", text) else None


def _in_file(path: Path) -> dict[str, int]:
    hosts = {}
    for line in read_bounded(path).splitlines():
        words = line.partition("#")[0].split()
        if words:
            host, slots = _entry(words[0])
            given = re.search(r"slots\s*=\s*([0-9]{1,9})\b", line)
            hosts[host] = int(given.group(1)) if given else slots
    return hosts


def _entry(text: str) -> tuple[str, int]:
    host, _, slots = text.strip().partition(":")
    number = whole_number(slots)
    return host, 1 if number is None else number


def _checked(hosts: dict[str, int], where: str) -> dict[str, int]:
    for host in hosts:
        check_name(host, where)
    return {host: slots for host, slots in hosts.items() if slots > 0}
