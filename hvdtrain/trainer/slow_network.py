"""A network between hosts that is slow, or becomes slow: said once, with how much and what to look at."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvdtrain.trainer.component import Component
from hvdtrain.trainer.lasting import INTERVAL_S, Lasting
from hvdtrain.trainer.rank_figures import RankFigures
from hvdtrain.trainer.strategy import EveryStep

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training

# Intervals that tell what is usual, the least of them, and how many times it, and what share of a step more, is slower.
_USUAL, _LEAST, _SLOWER, _MORE = 30, 5, 2.0, 0.1
# Slow from the start: more of a step than this is waiting, and no more than this travels meanwhile, as on 1 Gbit/s.
_SHARE, _BYTES_PER_S, _LEAST_BYTES = 0.3, 0.1e9, 1e6
# What may last: a network that is slow, and one that has become slower.
_SLOW, _BECOME, _WATCHED = 0, 1, 2


class NetworkJudge:
    """Judges the network by the rank that waits least for averages: it came last, and waits for nobody's computing.

    A function of the figures alone, alike on every rank.
    """

    def __init__(self) -> None:
        self._lines: list[tuple[int, float, float, float, float]] = []
        """Of each line since the last interval: steps, and of a step: seconds, wait, own part, bytes."""
        self._usual: deque[tuple[float, float]] = deque(maxlen=_USUAL)
        """Wait and own part of intervals."""
        self._is_first = True
        self._lasting = Lasting()
        self._has_said_slow = False

    def add(self, ranks: Sequence[RankFigures], steps: int, num_bytes: float) -> str:
        """Take the figures of the ranks, means over so many steps, and the bytes of a step; returns what to say."""
        step_s = max(figures.step_s for figures in ranks)
        wait = min(figures.wait_s for figures in ranks)
        own = statistics.median(figures.own_s for figures in ranks)
        self._lines.append((steps, step_s, wait, own, num_bytes))
        if sum(line[0] * line[1] for line in self._lines) < INTERVAL_S:
            return ""
        whole = sum(line[0] for line in self._lines)
        step_s, wait, own, num_bytes = (
            sum(line[0] * line[place] for line in self._lines) / whole for place in (1, 2, 3, 4)
        )
        self._lines = []
        is_first, self._is_first = self._is_first, False
        return "" if is_first else self._judge(step_s, wait, own, num_bytes, len(ranks))

    def _judge(self, step_s: float, wait: float, own: float, num_bytes: float, size: int) -> str:
        usual = statistics.median(before for before, _ in self._usual) if self._usual else 0.0
        usual_own = statistics.median(before for _, before in self._usual) if self._usual else 0.0
        # Where computing takes longer as well, it is the machines.
        slowed = max(1.0, own / usual_own) if usual_own > 0 else 1.0
        is_slower = (
            len(self._usual) >= _LEAST and wait >= _SLOWER * slowed * usual and wait - slowed * usual >= _MORE * step_s
        )
        # What was hidden behind computing is not in the wait: the true rate is lower still.
        rate = 2 * (size - 1) / size * num_bytes / max(wait, 1e-9)
        is_slow = wait >= _SHARE * step_s and rate < _BYTES_PER_S and num_bytes >= _LEAST_BYTES
        found = self._lasting.add([what for what, is_so in ((_SLOW, is_slow), (_BECOME, is_slower)) if is_so], _WATCHED)
        if not is_slower:
            self._usual.append((wait, own))
        if _BECOME in found:
            self._usual.clear()  # what is usual is learned anew
            self._lasting.forget(_BECOME)
            self._has_said_slow = True
            return (
                "the network between the hosts has become slower: the rank that waits least for it waits"
                f" {wait:.3g} s of a step, {wait / max(usual, 1e-9):.3g} times as long as before ({usual:.2g} s), and"
                " computing takes no longer. Likely cause: a link that has lost bandwidth, or other traffic on it"
            )
        if _SLOW in found and not self._has_said_slow:
            self._has_said_slow = True
            return (
                f"the network between the hosts is slow: all ranks wait for it {wait / step_s:.0%} of a step, and"
                f" {num_bytes / 1e6:.3g} MB of gradients travel at {rate / 1e6:.3g} MB/s at most. Likely cause: a slow"
                " link, or one that is shared. Fewer bytes travel by --comm.compression or a larger --train.accum-steps"
            )
        return ""


class SlowNetwork(Component):
    """`--health.slow-rank`, of what lies between the hosts."""

    name = "slow_network"

    def __init__(self, job: Job) -> None:
        self._job, self._judge = job, NetworkJudge()
        self._step, self._bytes = 0, 0

    @classmethod
    def of(cls, job: Job) -> SlowNetwork | None:
        """Return one where gradients travel between hosts in every step."""
        launch = job.world.launch
        is_between = 1 <= launch.local_size < job.world.size and isinstance(job.strategy, EveryStep)
        return cls(job) if is_between and job.config.health.slow_rank is not None else None

    def attach(self, training: Training) -> None:
        """Note what was sent so far."""
        self._step, self._bytes = training.step, self._sent()

    def _sent(self) -> int:
        return self._job.world.handed_bytes["gradients"]

    def metrics(self, training: Training) -> dict[str, float]:
        """Judge the steps since the last line, by figures that every rank has."""
        steps, sent = max(1, training.step - self._step), self._sent()
        said = self._judge.add(training.ranks, steps, (sent - self._bytes) / steps)
        self._step, self._bytes = training.step, sent
        if said:
            where = "`doctor` on these hosts names the pair that is slow"
            self._job.log.say(f"WARNING: step {training.step}: {said}. {where}")
        return {}
