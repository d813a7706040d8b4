"""What launchers keep in folders: Open MPI's session, horovodrun's cache. Standard library only."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Open MPI 5 and 4 would count the tasks of Slurm's job as this machine's slots (one, after `srun --pty bash`), and
# start their daemon by srun.
_HERE = dict.fromkeys(("PRTE_MCA_ras", "PRTE_MCA_plm", "OMPI_MCA_ras", "OMPI_MCA_plm"), "^slurm")
_ROOT = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
_VARIABLES = ("PRTE_MCA_prte_local_tmpdir_base", "OMPI_MCA_orte_local_tmpdir_base")  # of Open MPI 5 and 4


@contextlib.contextmanager
def session_folder() -> Iterator[dict[str, str]]:
    """Hold an empty folder for one launch; gives the variables that make a launcher on this host use it.

    Left to itself, `mpirun` takes a folder that is named by its process number. One that was killed leaves it behind,
    and a later one with the same number, which in a container comes at every start, does not start ("The PMIx server's
    listener thread failed to start").
    """
    with contextlib.ExitStack() as held:
        given = {}
        with contextlib.suppress(OSError):  # nothing can be written: the launcher says so better
            folder = tempfile.TemporaryDirectory(prefix="hvdtrain-mpi-", ignore_cleanup_errors=True)
            given = dict.fromkeys(_VARIABLES, held.enter_context(folder))
        yield given


def on_this_machine() -> dict[str, str]:
    """Return the variables by which `mpirun` starts ranks on this machine alone: as root, and in Slurm's jobs, too."""
    as_root = _ROOT if os.geteuid() == 0 else {}  # in containers and cron, as a rule
    return as_root | _HERE if "SLURM_JOB_ID" in os.environ else as_root


def horovodrun_options() -> list[str]:
    """Return what `horovodrun` is told where it cannot keep what it has found out about hosts, in `~/.horovod`.

    It ends with a traceback there, as for a user whose HOME is another one's (`docker run --user N`).
    """
    folder = Path(os.path.expanduser("~")) / ".horovod"  # noqa: PTH111 - pathlib raises where there is no such user
    place = folder if folder.exists() else folder.parent
    return [] if os.access(place, os.W_OK | os.X_OK) else ["--disable-cache"]
