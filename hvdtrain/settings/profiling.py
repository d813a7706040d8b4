"""The section `profile`: which steps are looked at closely."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hvdtrain.errors import ConfigError
from hvdtrain.settings.fields import Section, setting

# Each step of each rank is some thousand events: beyond this, no viewer opens the file.
_MOST_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(Section):
    """Some steps looked at closely."""

    timeline: str | None = setting(None, changeable=True)
    """Steps A:B, both included, such as 20:22: write RUN_DIR/timeline.json, which https://ui.perfetto.dev opens, with
    what each rank did in them, and say in words where the time went. These steps take longer."""
    ranks: str | None = setting(None, changeable=True)
    """Ranks that --profile.timeline records, such as 0,3, or all. None: the first two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timeline is not None:
            first, last = self._parsed()
            if not 0 < first <= last:
                raise ConfigError(f"profile.timeline = {self.timeline}: A:B are steps from 1 on, A not above B")
            if last - first >= _MOST_STEPS:
                raise ConfigError(
                    f"profile.timeline = {self.timeline} are more than {_MOST_STEPS} steps, which no viewer opens"
                )
        if self.ranks not in (None, "all") and not re.fullmatch(r"\d{1,6}(,\d{1,6})*", self.ranks, re.ASCII):
            raise ConfigError(f"profile.ranks = {self.ranks[:40]} must be all, or numbers of ranks such as 0,1")

    @property
    def steps(self) -> tuple[int, int] | None:
        """Return the first and the last step of the timeline; None where none is asked for."""
        return None if self.timeline is None else self._parsed()

    def of_ranks(self, size: int) -> list[int]:
        """Return the ranks that are recorded, of so many.

        Raises:
            ConfigError: one that was named is not there.
        """
        if self.ranks is None or self.ranks == "all":
            return [*range(size if self.ranks else min(size, 2))]
        named = sorted({*map(int, self.ranks.split(","))})
        if named[-1] >= size:
            raise ConfigError(f"--profile.ranks {self.ranks}: the ranks are 0 to {size - 1}")
        return named

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield the ranks where nothing is recorded."""
        if self.timeline is None:
            yield "ranks", "it belongs to --profile.timeline"

    def _parsed(self) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", self.timeline or "", re.ASCII)
        if match is None:
            raise ConfigError(f"profile.timeline = {(self.timeline or '')[:40]} must be two steps, such as 20:22")
        return int(match[1]), int(match[2])
