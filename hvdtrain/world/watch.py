"""Work that all ranks do while they watch over each other; what ends it is told once."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from hvdtrain.errors import ConfigError, HvdtrainError, StopRequested, on_all_ranks
from hvdtrain.process.launch import Launch
from hvdtrain.process.output import is_of_output, lost_words, tell
from hvdtrain.process.stop import StoppedEarly, leaving_by
from hvdtrain.process.tracebacks import place_of, sentence_of, stack_of
from hvdtrain.settings import Config, to_dict
from hvdtrain.world.heartbeat import Heartbeat
from hvdtrain.world.numerics import fp32_products, repeatable
from hvdtrain.world.start import init
from hvdtrain.world.world import World

T = TypeVar("T")
# Of a GPU; a process that takes too much of the host is killed without a word.
_LESS_MEMORY = (
    "what needs less memory of a GPU: --train.micro-batch-size N with fewer samples (the rest by accumulation),"
    " --model.checkpoint-blocks, --train.precision bf16, --optim.offload cpu, and --optim.shard between ranks;"
    " --dry-run says what a rank needs"
)


def watched(
    config: Config,
    work: Callable[[World, Heartbeat, list[int]], T],
    groups: Callable[[Launch], Sequence[tuple[int, ...]]] = lambda launch: (),
    *,
    leaves: bool = True,
) -> T:
    """Run `work` on all ranks, which watch over each other meanwhile. Collective.

    An exception on one rank alone ends the job: it is reported once, and no rank returns. One process of a program
    that does not want to be left (`leaves=False`) gets it as it is.

    Args:
        config: the settings; all ranks must have the same.
        work: is given the world, the heartbeat, and the ranks that cannot be watched.
        groups: for `init`.
        leaves: as a command does, print an error that all ranks have and leave the process. False: raise it.

    Raises:
        LaunchError: there is no world.
        SystemExit: with `leaves`, on all ranks alike, with the exit code of what rank 0 has printed.
        HvdtrainError: without, on all ranks alike.
    """
    with repeatable(config.train.deterministic):
        return _watched(config, work, groups, leaves)


def _watched(
    config: Config,
    work: Callable[[World, Heartbeat, list[int]], T],
    groups: Callable[[Launch], Sequence[tuple[int, ...]]],
    leaves: bool,
) -> T:
    world = init(groups)
    heartbeat = Heartbeat(world, config.health.stall_limit_s)
    unwatched = heartbeat.start()
    try:
        with leaving_by(heartbeat.fail), fp32_products(config.train.precision, world.device):
            _check_same_settings(config, world)
            result = work(world, heartbeat, unwatched)
    except BaseException as error:  # of any type: a rank that leaves without a word is missed, not understood
        if leaves or world.launch.is_parallel:
            _end_job_if_alone(error, world, heartbeat)
        if leaves and isinstance(error, HvdtrainError):
            _print_once(error, world)
        heartbeat.close()
        if leaves and isinstance(error, HvdtrainError):
            raise SystemExit(error.exit_code) from error
        raise
    heartbeat.close()
    return result


def _end_job_if_alone(error: BaseException, world: World, heartbeat: Heartbeat) -> None:
    """End the job with the reason, unless every rank raises this error at the same place."""
    where = f"rank {world.rank} on {socket.gethostname()}"
    if isinstance(error, HvdtrainError):
        if not error.is_on_all_ranks:
            code = 1 if isinstance(error, StopRequested) else error.exit_code  # 75 says that all have saved
            heartbeat.fail(f"hvdtrain: {where}: {error}\n{error.stack}".rstrip("\n"), code)
    elif isinstance(error, StoppedEarly):
        heartbeat.fail(f"hvdtrain: {where}: {error.reason}", StoppedEarly.exit_code)
    elif isinstance(error, SystemExit):
        # A recipe or a library has left by itself: nothing has finished, whatever its code says.
        place = place_of(error)
        by = f"sys.exit({error.code!r}){place and f' in {place}'}"
        heartbeat.fail(f"hvdtrain: {where} was left by {by} at {world.progress.read()}\n{stack_of(error)}")
    elif isinstance(error, KeyboardInterrupt):
        heartbeat.fail(f"hvdtrain: interrupted at once, at {world.progress.read()}")
    elif is_of_output(error):  # `verify lm | head -1`, or a full disk: no fault of what was asked for
        heartbeat.fail(f"hvdtrain: {lost_words(error)}", 0 if isinstance(error, BrokenPipeError) else 1)
    else:
        if world.has_lost_contact(error):
            heartbeat.lose(str(error))
        words = f"{where} failed at {world.progress.read()}: {sentence_of(error)}"
        less = f"hvdtrain: {_LESS_MEMORY}\n" if isinstance(error, torch.OutOfMemoryError) else ""
        heartbeat.fail(f"hvdtrain: {words}\n{less}{stack_of(error)}")


def _print_once(error: HvdtrainError, world: World) -> None:
    """Print an error on rank 0; a launcher ends the job as soon as any rank leaves, so the others wait. Collective."""
    if world.rank == 0:
        tell(f"hvdtrain: {error}\n{error.stack}".rstrip("\n"))
    world.barrier("farewell")


def _check_same_settings(config: Config, world: World) -> None:
    """Raise ConfigError where ranks were given other settings than rank 0, as by files that differ between hosts."""
    if world.agrees(to_dict(config), "settings"):
        return
    everyone = world.all_gather_object(to_dict(config), "settings.all")
    others = [str(rank) for rank, settings in enumerate(everyone) if settings != everyone[0]]
    if others:
        who = f"rank {', '.join(others)}"
        raise on_all_ranks(
            ConfigError(f"{who} was given other settings than rank 0: give all ranks the same command and files")
        )
