"""`--profile.timeline A:B`: what the ranks do in steps A to B, in one file, and in words."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import TYPE_CHECKING

from torch import nn

from hvdtrain.errors import ConfigError, reason_of
from hvdtrain.settings.files import replaced_whole
from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.recorder import Recorder, Recording
from hvdtrain.trainer.trace import in_words, trace_of
from hvdtrain.world.clocks import clock_offsets

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training


class Timeline(Component):
    """Records some steps of some ranks; rank 0 writes `timeline.json` and says where the time went.

    Outside of these steps it compares a number. What it records does not touch what is computed.
    """

    name = "timeline"

    def __init__(self, job: Job, first: int, last: int) -> None:
        self._job, self._world = job, job.world
        self._first, self._last = first, min(last, job.num_steps)
        """Step numbers; 0: no step is to come."""
        self._ranks = job.config.profile.of_ranks(job.world.size)
        self._recorder: Recorder | None = None
        self._is_recording = False
        """On any rank."""
        self._begin_after(0)

    @classmethod
    def of(cls, job: Job) -> Timeline | None:
        """Return one where `--profile.timeline` is given, and this is a run.

        Raises:
            ConfigError: the run has no such step, or no such rank.
        """
        steps = job.config.profile.steps
        if steps is None or job.directory is None:
            return None
        first, last = steps
        if first > job.num_steps:
            raise ConfigError(f"--profile.timeline {first}:{last}: the run has {job.num_steps} steps")
        return cls(job, first, last)

    def attach(self, training: Training) -> None:
        """See how far the run is."""
        self._begin_after(training.step)

    def _begin_after(self, step: int) -> None:
        """Take in how many steps are completed."""
        self._step = step
        self._first = max(self._first, step + 1)
        if self._first > self._last:
            self._first = 0
            self.about = "profile:    the steps to record are over, and none is recorded"
            return
        ranks = ", ".join(map(str, self._ranks))
        self.about = (
            f"profile:    steps {self._first} to {self._last} of rank {ranks} will be in {self._job.run.timeline};"
            " they take longer"
        )

    def begin(self, model: nn.Module) -> None:
        """Begin to record where the first step of all is to be."""
        if self._step + 1 == self._first:
            self._start()

    def after_update(self, training: Training, step: Step) -> None:
        """Begin behind the step before the first, end behind the last. Collective then."""
        if self._recorder is not None:
            self._recorder.end_step()
        if step.number == self._last and self._is_recording:
            self._finish()
        elif step.number + 1 == self._first:
            self._start()
        elif self._recorder is not None:
            self._recorder.begin_step(step.number + 1)

    def close(self, is_agreed: bool) -> None:
        """Write what there is where the run ends before the last of these steps. Collective where `is_agreed`."""
        if self._is_recording and is_agreed:
            self._finish()
        elif self._recorder is not None:
            self._recorder.drop()
        self._recorder, self._is_recording = None, False

    def _start(self) -> None:
        self._is_recording = True
        if self._world.rank in self._ranks:
            self._recorder = Recorder(self._world, socket.gethostname())
            self._recorder.start(self._first)

    def _finish(self) -> None:
        """Bring together on rank 0 what the ranks have recorded, and write it. Collective."""
        with self._world.progress.during("saving"):
            own = self._recorder.stop() if self._recorder is not None else None
            self._recorder, self._is_recording = None, False
            offsets = clock_offsets(self._world)
            # One at a time: all of them may be more than fits into a rank's memory.
            found: list[Recording] = []
            for rank in self._ranks:
                recording = self._world.broadcast_object(own if rank == self._world.rank else None, "timeline", rank)
                if self._world.rank == 0:
                    found.append(recording)
            if self._world.rank == 0:
                self._write(json.dumps(trace_of(found, offsets)))
                for line in in_words(found):
                    self._job.log.say(line)

    def _write(self, text: str) -> None:
        """Write the file; where that cannot be, the run goes on without it."""
        file = self._job.run.timeline
        try:
            with replaced_whole(file) as temporary:
                temporary.write_text(text)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._job.log.say(f"WARNING: {file} cannot be written ({reason_of(error)}): the timeline is lost")
