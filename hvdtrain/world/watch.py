"""Work that all ranks do while they watch over each other; what ends it is told once."""

from __future__ import annotations

import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.process.launch import Launch
from hvdtrain.settings import Config, to_dict
from hvdtrain.world.heartbeat import Heartbeat
from hvdtrain.world.start import init
from hvdtrain.world.world import World

T = TypeVar("T")


def watched(
    config: Config,
    work: Callable[[World, Heartbeat, list[int]], T],
    groups: Callable[[Launch], Sequence[tuple[int, ...]]] = lambda launch: (),
) -> T:
    """Run `work` on all ranks, which watch over each other meanwhile. Collective.

    It is given the world, the heartbeat, and the ranks that cannot be watched; `groups` is for `init`. An exception on
    any rank ends the job: it is told once, and no rank returns.

    Raises:
        LaunchError: there is no world.
        SystemExit: on all ranks alike, with the exit code of what rank 0 has told.
    """
    world = init(groups)
    heartbeat = Heartbeat(world, config.health.stall_limit_s)
    unwatched = heartbeat.start()
    try:
        _check_same_settings(config, world)
        result = work(world, heartbeat, unwatched)
    except HvdtrainError as error:
        if not error.is_on_all_ranks:
            heartbeat.fail(f"hvdtrain: rank {world.rank} on {socket.gethostname()}: {error}", error.exit_code)
        if world.rank == 0:
            sys.stderr.write(f"hvdtrain: {error}\n")
            sys.stderr.flush()
        world.barrier("farewell")
        heartbeat.close()
        raise SystemExit(error.exit_code) from error
    except KeyboardInterrupt:
        heartbeat.fail(f"hvdtrain: interrupted at once, at {world.progress.read()}")
    except Exception as error:
        if world.has_lost_contact(error):
            heartbeat.lose(str(error))
        place = world.progress.read()
        heartbeat.fail(
            f"hvdtrain: rank {world.rank} on {socket.gethostname()} failed at {place}\n{traceback.format_exc()}"
        )
    heartbeat.close()
    return result


def _check_same_settings(config: Config, world: World) -> None:
    """Raise ConfigError where ranks were given other settings than rank 0, as by files that differ between hosts."""
    everyone = world.all_gather_object(to_dict(config), "settings")
    others = [str(rank) for rank, settings in enumerate(everyone) if settings != everyone[0]]
    if others:
        error = ConfigError(
            f"rank {', '.join(others)} was given other settings than rank 0: give all ranks the same command and files"
        )
        error.is_on_all_ranks = True
        raise error
