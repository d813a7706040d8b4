"""Variables that call this process a rank although nothing has started it as one. Standard library only.

They are left in a shell by another job, by a script that sets them by hand, or by a rank from which the shell was
started. Nobody can be sure: a launcher that this list does not know, or one outside of a container, is not seen.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from hvdtrain.process.ancestors import given_to_launcher, is_launched
from hvdtrain.process.launch import Launch
from hvdtrain.process.output import tell

_SIGNS = {
    "horovodrun --gloo": ("HOROVOD_RANK", "HOROVOD_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "srun": ("SLURM_STEP_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE"),
    "torchrun": ("RANK", "WORLD_SIZE"),
    "accelerate launch": ("RANK", "WORLD_SIZE"),
}
# What horovodrun --gloo gives each rank a value of its own; one that it was started with takes the place of them all.
_OF_GLOO = {
    f"HOROVOD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "HOSTNAME")
}


def stray_hint(launch: Launch, environ: Mapping[str, str] = os.environ) -> str:
    """Return what to add to a sentence about a rank: which variables to unset if nothing has started it as one.

    "" where a launcher is seen above this process, or nothing calls it a rank.
    """
    if before := set_before_gloo(launch):
        return f"; {before} was set before horovodrun --gloo was started: unset it there"
    if not launch.is_parallel or is_launched():
        return ""
    names = " ".join(name for name in _SIGNS[launch.launcher] if name in environ)
    return f"; no launcher is seen above this process: if none has started it, unset {names}"


def set_before_gloo(launch: Launch) -> str:
    """Return which variables horovodrun --gloo was started with that are alike on all its ranks now; "" if none."""
    is_gloo = launch.launcher == "horovodrun --gloo"
    return " ".join(sorted(_OF_GLOO & given_to_launcher())) if is_gloo else ""


def leave_to_rank_0(launch: Launch) -> int:
    """Say nothing where rank 0 answers; where there may be none, say why this one does not. Returns an exit code."""
    hint = stray_hint(launch)
    if hint:
        tell(f"hvdtrain: rank 0 answers, and this is rank {launch.rank} of {launch.size}{hint}")
    return 2 if hint else 0
