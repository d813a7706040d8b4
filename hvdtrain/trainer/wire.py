"""What the codec of the gradients remembers between steps, such as the error that rounding has left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdtrain.trainer.component import Component
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.strategy import EveryStep
from hvdtrain.world import Codec, codec_of


class WireFormat(Component):
    """Gives the wrapped optimizer its codec, and keeps what that remembers; each rank has its own.

    On another number of ranks the codec begins anew: what one rank has left over means nothing to the others.
    """

    name = "codec"
    is_replicated = False

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.wrap_options = {"compression": codec}

    @classmethod
    def of(cls, job: Job) -> WireFormat | None:
        """Return one with the codec that `--comm.compression` names, where gradients travel."""
        if not isinstance(job.strategy, EveryStep):
            return None
        return cls(codec_of(job.config.comm.compression))

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank's codec remembers."""
        return self._codec.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the codec go on from what it remembered."""
        self._codec.load_state_dict(dict(state))
