"""The first time that GPUs of several ranks talk: where NCCL hangs or refuses, before anything depends on it.

NCCL starts with the first collective on GPUs, and may wait there for ever: for a network that it has chosen wrongly, or
for a host that a firewall hides. No step has begun then, so nobody would notice. It also takes its memory here, before
the memory that is left is compared with what training needs.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
from collections.abc import Iterator, Mapping

import torch

from hvdtrain.errors import LaunchError
from hvdtrain.process.output import tell
from hvdtrain.world.world import World

SECONDS = 180.0
"""How long NCCL may take to start; hundreds of GPUs take a minute."""
LIMIT = "HOROVOD_NCCL_START_LIMIT"
"""Variable that says so instead, in seconds, 0 for ever; the engine heeds it for each later start as well."""
# Rank 0 speaks; if it is not there any more, the others do.
_SECONDS_FOR_RANK_0 = 3.0


def contact_gpus(world: World, limit_s: float | None = None) -> None:
    """All-reduce one number on the ranks' devices; the process ends with a sentence where that hangs. Collective.

    Args:
        world: the ranks.
        limit_s: how long it may take, 0 for ever; None: as the environment says.

    Raises:
        LaunchError: NCCL refuses, as it does where two ranks share a GPU, or the sum is wrong; or the environment's
            limit is no number of seconds.
    """
    if limit_s is None:
        limit_s = limit_of(os.environ)
    later_s = _SECONDS_FOR_RANK_0 if world.rank and limit_s else 0.0
    with ending_after(limit_s + later_s, _hangs(world, limit_s)):
        try:
            total = float(world.all_reduce(torch.ones(1, device=world.device), "sum", "first_contact"))
        except Exception as error:
            if not world.has_lost_contact(error):
                raise
            raise LaunchError(
                f"NCCL does not start on rank {world.rank} ({socket.gethostname()}): {error}. It refuses two ranks on"
                " one GPU, and two MIG instances of one: start one rank per GPU; NCCL_DEBUG=WARN says more"
            ) from error
    if total != world.size:
        raise LaunchError(
            f"an all-reduce of ones over {world.size} GPUs gave {total:g}: `python -m hvdtrain doctor` under the same"
            " launcher looks for the reason; NCCL_P2P_DISABLE=1 avoids faulty paths between GPUs of one host"
        )


def limit_of(environ: Mapping[str, str]) -> float:
    """Return how many seconds NCCL may take to start; 0: as many as it likes.

    Raises:
        LaunchError: the variable holds something else.
    """
    given = environ.get(LIMIT) or SECONDS
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise LaunchError(f"{LIMIT}={given} is no number of seconds: give one, 0 for no limit, or unset it")
    return seconds


@contextlib.contextmanager
def ending_after(limit_s: float, reason: str) -> Iterator[None]:
    """End the process, exit code 1, where what is done within takes longer, if not 0; it cannot be interrupted."""
    if not limit_s:
        yield
        return

    def end() -> None:
        tell(f"hvdtrain: {reason}")
        os._exit(1)

    timer = threading.Timer(min(limit_s, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _hangs(world: World, limit_s: float) -> str:
    chosen = os.environ.get("NCCL_SOCKET_IFNAME")
    now = f"it is {chosen} now" if chosen else "NCCL chooses by itself now"
    return (
        f"NCCL has not started within {limit_s:g} s on rank {world.rank} ({socket.gethostname()}): set"
        " NCCL_SOCKET_IFNAME to the names of the interfaces that all hosts reach each other by, as in `ip link`"
        f" ({now}), and let their firewalls pass; NCCL_DEBUG=INFO says where it waits, and {LIMIT}=SECONDS gives"
        " it more time"
    )
