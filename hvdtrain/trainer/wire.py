"""The format of gradients on the wire: what its codec remembers between steps, and how many bytes travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hvdtrain.errors import ConfigError
from hvdtrain.optim.groups import trainable_by_name
from hvdtrain.settings import Config
from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.strategy import EveryStep
from hvdtrain.world import Codec, codec_for

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training


def check_compression(config: Config) -> None:
    """Raise ConfigError where what a codec remembers would be of the size of other gradients."""
    if config.train.precision == "fp16" and codec_for(config.comm).is_approximate:
        raise ConfigError(
            f"--comm.compression {config.comm.compression} remembers a part of the gradients for later steps, and the"
            " loss scale of --train.precision fp16 gives these another size: use --train.precision bf16"
        )


class WireFormat(Component):
    """Gives the wrapped optimizer its codec, and keeps what that remembers; each rank has its own."""

    name = "codec"
    is_replicated = False

    def __init__(self, job: Job, codec: Codec) -> None:
        self._job = job
        self._codec = codec
        self.wrap_options = {"compression": codec}
        self.about = about(job, codec)

    @classmethod
    def of(cls, job: Job) -> WireFormat | None:
        """Return one with the codec that `--comm.compression` names, where gradients travel."""
        is_sent = isinstance(job.strategy, EveryStep)
        return cls(job, codec_for(job.config.comm, job.task.model)) if is_sent else None

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank's codec remembers."""
        return self._codec.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the codec go on from what it remembered; say where another format has no use for it."""
        if state and not self._codec.remembers:
            _say_dropped(self._job, self._codec, self._job.world.size)
            return
        self._codec.load_state_dict(dict(state))

    def redistribute(self, states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any] | None:
        """Return what another number of ranks goes on with."""
        return redistributed(self._job, self._codec, states)


def about(job: Job, codec: Codec, each: str = "step") -> str:
    """Return a line about what is compressed, where something is and there are several ranks; `each`: of what."""
    if job.world.size == 1:
        return ""
    shapes = [(name, parameter.shape) for name, parameter in trainable_by_name(job.task.model).items()]
    return codec.about(shapes, each)


def redistributed(job: Job, codec: Codec, states: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what each rank's codec goes on with where another number of ranks has saved, and say it."""
    size = job.world.size
    if not any(states):
        return None
    if size > 1 and not codec.remembers:
        _say_dropped(job, codec, len(states))
        return None
    if size == 1:
        job.log.say(
            f"WARNING: {len(states)} ranks had a part of their gradients still to send; one rank sends nothing, and"
            " it is dropped"
        )
        return None
    merged = codec.merged(states, size)
    if merged is not None:
        job.log.say(
            f"WARNING: {len(states)} ranks had a part of their gradients still to send, and {size} go on: each with an"
            " equal part of the sum"
        )
    return merged


def _say_dropped(job: Job, codec: Codec, count: int) -> None:
    job.log.say(
        f"WARNING: {count} ranks had a part of their gradients still to send, and --comm.compression {codec.name} sends"
        " all of each step's own: it is dropped"
    )


def in_parts(tensors: Mapping[str, Tensor], num_bytes: int) -> Iterator[list[str]]:
    """Yield names of tensors that travel together: as many as fit, one that is larger by itself."""
    names: list[str] = []
    room = num_bytes
    for name, tensor in tensors.items():
        if names and tensor.nbytes > room:
            yield names
            names, room = [], num_bytes
        names.append(name)
        room -= tensor.nbytes
    if names:
        yield names


class Traffic(Component):
    """Counts the bytes that this rank hands over for gradients, or for updates, in a step."""

    name = "traffic"

    def __init__(self, job: Job) -> None:
        self._handed = job.world.handed_bytes
        self._before: int | None = None
        self._steps = 0

    @classmethod
    def of(cls, job: Job) -> Traffic | None:
        """Return one where there are several ranks."""
        return cls(job) if job.world.size > 1 else None

    def begin(self, model: Any) -> None:
        """Begin to count."""
        self._before = self._now()

    def _now(self) -> int:
        return self._handed["gradients"] + self._handed["outer"]

    def after_update(self, training: Training, step: Step) -> None:
        """Count the step."""
        self._steps += 1

    def metrics(self, training: Training) -> dict[str, float]:
        """Return the bytes of a step, in the mean since the last call."""
        now, steps = self._now(), self._steps
        before, self._before, self._steps = self._before or 0, now, 0
        return {"comm/bytes_per_step": (now - before) / steps} if steps else {}
