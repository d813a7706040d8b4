"""Whether ranks can average in another way beside a training's other settings: what training refuses, in its words."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.settings import Config
from hvdtrain.trainer.local_updates import strategy_of
from hvdtrain.trainer.strategy import EveryStep
from hvdtrain.trainer.wire import check_compression
from hvdtrain.world import Averaging


def why_refused(config: Config, **comm: Any) -> str:
    """Return why two and more ranks cannot train so, in one sentence; "" where they can.

    Args:
        config: of the training.
        comm: settings of its section that are another ones.
    """
    try:
        changed = dataclasses.replace(config, comm=dataclasses.replace(config.comm, **comm))
        check_compression(changed)
        if isinstance(strategy_of(changed, 2), EveryStep):
            compression, op = changed.comm.compression, changed.comm.op
            Averaging(compression=compression, op=op, has_square=changed.health.noise_scale)
    except ConfigError as error:
        return str(error)
    return ""
