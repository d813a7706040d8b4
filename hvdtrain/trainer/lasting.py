"""What lasts is told from what happens by chance: by counting, with a bound that grows with the number of tries."""

from __future__ import annotations

from collections.abc import Collection, Iterator

# Lines of metrics are put together until they are of so many seconds: shorter ones are noise.
INTERVAL_S = 2.0
# What is so in this many intervals in a row lasts, where little has been watched yet: so many ranks times intervals.
INTERVALS, TRIES = 5, 20
# An interval in which it is not so takes as many others back.
BACK = 2


class Lasting:
    """Says which of several things, such as ranks that are slow, last: a function of what it was given, on any rank.

    Each thing has a count: one up in an interval in which it is so, two down in one in which it is not, so that what is
    so in four intervals of five is found, and what is so in every other one is not. How high it must count grows by one
    whenever the number of tries, things times intervals, has doubled. So false alarms are few, however long a run is
    and however many ranks it has, as long as chance makes something so in fewer than 0.4 of the intervals.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._tries = 0

    @property
    def needed(self) -> int:
        """Return how high a count must be now."""
        return INTERVALS + max(0, (self._tries // TRIES).bit_length() - 1)

    def __iter__(self) -> Iterator[int]:
        """Yield the things of which it was so lately."""
        return iter(self._counts)

    def add(self, found: Collection[int], num_watched: int) -> list[int]:
        """Take the things of which it is so in this interval, of so many; returns those that last, ascending."""
        self._tries += num_watched
        counts = {thing: self._counts.get(thing, 0) + 1 for thing in found}
        counts |= {thing: count - BACK for thing, count in self._counts.items() if thing not in counts}
        needed = self.needed
        # Higher than needed it does not count, or what has ended long ago would still last.
        self._counts = {thing: min(count, needed) for thing, count in counts.items() if count > 0}
        return sorted(thing for thing, count in self._counts.items() if count >= needed and thing in found)

    def forget(self, thing: int) -> None:
        """Count this thing anew."""
        self._counts.pop(thing, None)
