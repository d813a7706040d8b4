"""A thread that looks which hosts are listed and which of them answer, again and again. Standard library only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from hvdtrain.errors import ConfigError
from hvdtrain.process.discovery import HostSource, NoListError
from hvdtrain.process.hosts import lost_hosts

_SECONDS_BETWEEN_CHECKS = 0.1


@dataclass(frozen=True)
class Look:
    """What was found at one time."""

    number: int = 0
    listed: Mapping[str, int] = field(default_factory=dict)
    """Slots of each host, as the source has listed them last."""
    there: frozenset[str] = frozenset()
    """Those that answer, of the listed hosts and of those in use."""
    heard: Mapping[str, float] = field(default_factory=dict)
    """When each host has answered last, on the clock of `time.monotonic`."""
    problem: str = ""
    """Why there is no newer list than the one before; empty: there is."""

    def slots(self) -> dict[str, int]:
        """Return the slots of each host that is listed and answers."""
        return {host: count for host, count in self.listed.items() if host in self.there}


class Lookout:
    """Looks every `every_s` seconds from `start` to `close`.

    Args:
        source: lists the hosts.
        ssh: command by which a host is asked whether it answers.
        every_s: seconds between two looks.
    """

    def __init__(self, source: HostSource, ssh: Sequence[str], every_s: float) -> None:
        self.source = source
        self.used: frozenset[str] = frozenset()
        """Hosts that have ranks: these are asked although they may not be listed any more."""
        self._ssh = ssh
        self._every_s = every_s
        self._latest = Look()
        self._begun = 0
        self._refusal = ""
        self._is_closing = False
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hvdtrain-hosts", daemon=True)

    @property
    def latest(self) -> Look:
        """Return what the last look has found."""
        return self._latest

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._is_closing = True
        self._wanted.set()
        self.source.close()

    def fresh(self, is_stopped: Callable[[], bool]) -> Look | None:
        """Return what a look finds that begins now, or None where `is_stopped` says so meanwhile.

        Raises:
            ConfigError: the hosts cannot be listed in the way that was given, and never were.
        """
        number = self._begun + 1
        self._wanted.set()
        if not self._wait_for(number, is_stopped):
            return None
        if self._refusal:
            raise ConfigError(f"there is no list of hosts: {self._refusal}")
        return self._latest

    def missing(self, hosts: Set[str]) -> Look:
        """Return what the look that is under way finds, if it misses one of these hosts, else what a fresh one does.

        A host that is gone is asked for seconds: to ask it once more would double what is lost with it.
        """
        under_way = self._begun
        is_under_way = self._latest.number < under_way
        self._wait_for(under_way, _never)
        if is_under_way and not hosts <= self._latest.there:
            return self._latest
        look = self.fresh(_never)
        assert look is not None
        return look

    def _wait_for(self, number: int, is_stopped: Callable[[], bool]) -> bool:
        """Wait for the end of the look of this number; returns False where `is_stopped` says so before."""
        while self._latest.number < number:
            if is_stopped():
                return False
            time.sleep(_SECONDS_BETWEEN_CHECKS)
        return True

    def _run(self) -> None:
        while not self._is_closing:
            self._wanted.clear()
            self._begun += 1
            self._latest = self._look(self._begun, self._latest)
            self._wanted.wait(self._every_s)

    def _look(self, number: int, before: Look) -> Look:
        listed, problem = before.listed, ""
        try:
            listed = self.source.look()
        except NoListError as error:
            problem = str(error)
            if error.is_lasting and not before.listed:
                self._refusal = problem
        except Exception as error:  # a source is never a reason to leave a run alone
            problem = f"{self.source.name} cannot be read ({type(error).__name__}: {error})"
        asked = [*listed, *(host for host in self.used if host not in listed)]
        lost = lost_hosts(asked, self._ssh) if self.source.is_asking_hosts else set()
        now = time.monotonic()
        there = frozenset(asked) - lost
        return Look(number, listed, there, {**before.heard, **dict.fromkeys(there, now)}, problem)


def _never() -> bool:
    return False
