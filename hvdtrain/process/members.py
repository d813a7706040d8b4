"""The hosts that a supervised run has now, and when that should change. Standard library only.

A host is used while it is listed and answers. One that is lost shrinks the run, a new one lets it grow; either way the
run is started anew, with the same global batch, from where it has saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import ConfigError, counted
from hvdtrain.process.aside import Aside
from hvdtrain.process.batch_size import asked_batch, saved_batch
from hvdtrain.process.host_words import leaving, names_of, with_verb
from hvdtrain.process.lookout import Look, Lookout
from hvdtrain.process.placement import Batch, Placement, asked_ranks, place
from hvdtrain.process.run_files import named_checkpoint

SAVE, REQUEST, NEVER = "save", "request", "never"
_SECONDS_BETWEEN_REMINDERS = 600.0


@dataclass(frozen=True)
class Rules:
    """What the user wants of the hosts."""

    min_ranks: int = 1
    max_ranks: int | None = None
    grow: str = SAVE
    """When a run takes new hosts in: once it has saved, on request, or never before it ends."""
    lost_after_s: float = 30.0
    """A host in use that does not answer for so long is lost; 0: that is left to the ranks to notice."""
    aside_s: float = 300.0
    longest_wait_s: float | None = None
    """For enough hosts; None: for ever."""


@dataclass(frozen=True)
class Change:
    """Why a run that goes well is to be started anew, on other hosts."""

    reason: str
    is_saving: bool
    """All its ranks can still be asked to save and stop; else it is ended at once."""
    may_take_long: bool = False
    """Nothing is lost while it saves: it has all the time it wants."""


class Members:
    """Decides on which hosts the run is started, and when anew.

    Args:
        command: the launcher's, or the training's.
        run_dir: of the run.
        lookout: finds the hosts.
        rules: what the user wants.
        say: is given what a person should know.
    """

    def __init__(
        self, command: list[str], run_dir: Path, lookout: Lookout, rules: Rules, say: Callable[[str], None]
    ) -> None:
        self._command = command
        self._run_dir = run_dir
        self.lookout = lookout
        self.rules = rules
        self._say = say
        self._aside = Aside(rules.aside_s)
        self._asked = asked_ranks(command)
        self.placement: Placement | None = None
        """Where the run is now, or was last."""
        self._proven: set[str] = set()
        """Hosts that were part of a run that has saved."""
        self._told: set[str] = set()
        self._seen_at: str | None = None
        self._is_growth_requested = False
        self._asked_batch: Batch | None = None
        self._recent: Look | None = None
        """What was found just now, when hosts were lost: asking them once more would take its time."""

    def ask_to_grow(self) -> None:
        """Take new hosts in as soon as there are any, without waiting for the next save."""
        self._is_growth_requested = True

    def place_next(self, is_stopped: Callable[[], bool]) -> Placement | None:
        """Wait for enough hosts, and return where the run is to start; None where `is_stopped` says so meanwhile.

        Raises:
            ConfigError: the hosts cannot be listed, the batch does not stay the same, or it never divides among as many
                ranks as there are to be at least.
            TimeoutError: there were too few for too long.
        """
        began, reminded, pause = time.monotonic(), -math.inf, 0.0
        self.lookout.used, self._seen_at = frozenset(), None
        while True:
            look, self._recent = self._recent or self._look_again(is_stopped, pause), None
            if look is None:
                return None
            placement = self._choose(look)
            if placement is not None:
                self._tell_placement(placement, look)
                self.placement, self.lookout.used = placement, frozenset(placement.hosts)
                return placement
            self._check_enough_can_come()
            now = time.monotonic()
            if self.rules.longest_wait_s is not None and now - began > self.rules.longest_wait_s:
                raise TimeoutError(f"{self._shortage(look)}; waited for {self.rules.longest_wait_s:g} s: giving up")
            if now - reminded >= _SECONDS_BETWEEN_REMINDERS:
                reminded = now
                self._say(f"{self._shortage(look)}: waiting for hosts of {counted(self.rules.min_ranks, 'rank')}")
            pause = 1.0

    def change(self) -> Change | None:
        """Return why the run is to be started anew, None while it should go on as it is."""
        look, used = self.lookout.latest, self.placement.hosts if self.placement else {}
        self._tell_problem(look)
        silent = self._silent(look, used)
        if silent:
            self._recent = look
            for host in silent:
                self._blame(host)
            have = with_verb(silent, "has", "have")
            return Change(f"{have} not answered for {self.rules.lost_after_s:g} s", is_saving=False)
        left = [host for host in used if look.listed.get(host, 0) < used[host]]
        if left and not look.problem:
            are_there = look.there.issuperset(left)
            for host in left:  # which is no failure, unless it comes and goes
                if host not in look.listed:
                    self._put_aside(host, self._aside.blame(host))
            return Change(leaving(left, look), is_saving=are_there)
        return self._growth(look)

    def note_end(self, has_failed: bool, has_progressed: bool, accused: Collection[str]) -> bool:
        """Note how an attempt has ended; returns whether it is known why, so that nothing is to be waited for.

        Args:
            has_failed: it ended neither on request nor finished.
            has_progressed: it has saved.
            accused: hosts whose ranks were lost, as the other ranks say.
        """
        used = set(self.placement.hosts) if self.placement else set()
        if has_progressed:
            self._proven |= used
        if not has_failed:
            return True
        look = self.lookout.missing(used)
        lost = used - look.there
        for host in lost | set(accused):
            self._blame(host)
        new = used - self._proven
        if not lost and not accused and new and new != used:
            for host in new:
                self._blame(host)
        self._recent = look if lost else None
        return bool(lost)

    def _look_again(self, is_stopped: Callable[[], bool], pause_s: float) -> Look | None:
        """Return a new look, after a pause: hosts that are waited for are not asked without end."""
        deadline = time.monotonic() + pause_s
        while time.monotonic() < deadline and not is_stopped():
            time.sleep(0.1)
        look = self.lookout.fresh(is_stopped)
        if look is not None:
            self._tell_problem(look)
        return look

    def _choose(self, look: Look) -> Placement | None:
        """Return where the run could be, None where that is nowhere with ranks enough.

        Hosts that it has had come first. Those put aside are taken where there would be too few without them.
        """
        slots, aside = look.slots(), self._aside.hosts()
        had = self.placement.hosts if self.placement else {}
        order = sorted(slots, key=lambda host: (host in aside, host not in had))
        for hosts in ([host for host in order if host not in aside], order):
            if not hosts:
                continue
            placement = place({host: slots[host] for host in hosts}, self._most(), self._asked, self._batch)
            if placement.ranks >= self.rules.min_ranks:
                return placement
        return None

    def _check_enough_can_come(self) -> None:
        """Raise ConfigError where no hosts whatever would make ranks enough: nobody should wait for them."""
        batch, least, most = self._batch(), self.rules.min_ranks, self._most()
        limit = batch.total if most is None else most
        reached = most if limit is None or limit == self._asked else batch.most_ranks(limit)
        if reached is not None and reached < least:
            samples = counted(batch.total or 0, "sample")
            among = f"the global batch of {samples} divides among" if reached != most else "the command has"
            up_to = f" of up to {most}" if reached != most and most is not None else ""
            raise ConfigError(
                f"--min-ranks {least} can never be had: {among} {counted(reached, 'rank')} at most{up_to}. Ask for"
                " fewer, or for another --max-ranks or --train.global-batch-size"
            )

    def _most(self) -> int | None:
        return self.rules.max_ranks or self._asked

    def _batch(self) -> Batch:
        saved = saved_batch(self._run_dir)
        if saved is None and self._asked_batch is None:
            self._asked_batch = asked_batch(self._command)  # starts a Python, hence once only
        return saved or self._asked_batch or Batch()

    def _silent(self, look: Look, used: Collection[str]) -> list[str]:
        if not self.rules.lost_after_s or not self.lookout.source.is_asking_hosts:
            return []
        since = time.monotonic() - self.rules.lost_after_s
        return [host for host in used if host not in look.there and look.heard.get(host, since) <= since]

    def _growth(self, look: Look) -> Change | None:
        """Return the change that lets the run grow, when it is time for it."""
        larger = None if self.rules.grow == NEVER and not self._is_growth_requested else self._choose(look)
        now = self.placement.ranks if self.placement else 0
        if larger is None or larger.ranks <= now:
            if self._is_growth_requested:
                self._say(f"asked to grow, but there is nothing to grow to: {self._shortage(look)}")
            self._seen_at, self._is_growth_requested = None, False
            return None
        checkpoint = named_checkpoint(self._run_dir)
        new = [host for host in larger.hosts if self.placement and host not in self.placement.hosts]
        if self._seen_at is None:
            self._seen_at = checkpoint
            when = "at its next save" if self.rules.grow == SAVE else "when SIGUSR2 asks for it"
            self._say(
                f"{names_of(new) or 'more slots'} can be had: the run grows from {now} to {larger.ranks} ranks {when}"
            )
        has_saved = self.rules.grow == SAVE and checkpoint != self._seen_at
        if not (has_saved or self._is_growth_requested):
            return None
        self._is_growth_requested = False
        return Change(f"growing from {now} to {larger.ranks} ranks", is_saving=True, may_take_long=True)

    def _blame(self, host: str) -> None:
        is_new = host not in self._proven and bool(self._proven)
        self._put_aside(host, self._aside.blame(host, is_new))

    def _put_aside(self, host: str, pause_s: float) -> None:
        if pause_s:
            self._say(f"{host} has failed or left repeatedly: it is put aside for {pause_s:g} s")

    def _shortage(self, look: Look) -> str:
        """Return what there is, in words."""
        slots, aside = look.slots(), self._aside.hosts()
        silent = [host for host in look.listed if host not in look.there]
        parts = [f"{counted(sum(slots.values()), 'slot')} on {names_of([*slots])}" if slots else "no host answers"]
        parts += [f"{names_of(silent)} cannot be reached"] if silent else []
        parts += [f"{names_of(sorted(aside))} put aside"] if aside else []
        if slots:
            lets = place(slots, self._most(), self._asked, self._batch).ranks
            parts += [f"{counted(lets, 'rank')} can be used"] if lets < sum(slots.values()) else []
        return ", ".join(parts)

    def _tell_placement(self, placement: Placement, look: Look) -> None:
        silent = [host for host in look.listed if host not in look.there]
        if silent:
            self._say(f"without {names_of(silent)}, which cannot be reached")
        aside = self._aside.hosts() & set(placement.hosts)
        if aside:
            was, it = with_verb(sorted(aside), "was", "were"), "is" if len(aside) == 1 else "are"
            self._say(f"{was} put aside, and {it} taken: there are no others")
        limit = min(placement.slots, self._most() or placement.slots)
        if placement.ranks < limit:
            self._say(f"using {placement.ranks} of {limit} slots: the global batch does not divide among more")
        self._say(f"starting {placement}")

    def _tell_problem(self, look: Look) -> None:
        """Say once what keeps the hosts from being listed, and once that they are listed again."""
        if look.problem and look.problem not in self._told:
            known = "going on with what was listed last" if look.listed else "nothing was listed yet"
            self._say(f"{look.problem}: {known}")
            self._told.add(look.problem)
        elif not look.problem and look.number and self._told:
            self._say(f"{self.lookout.source.name} lists hosts again")
            self._told.clear()
