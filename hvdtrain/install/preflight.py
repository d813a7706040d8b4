"""What a set-up needs of the machine, looked at before anything is downloaded.

Whatever is missing becomes one sentence and the command that mends it. Standard library only, any Python since 3.10.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from hvdtrain.install.clone import other_environment, setup_command

GIB = 2**30
# Measured with torch 2.13.0: 1.6 GiB of packages (CPU) or 7 GiB (CUDA), and 0.3 GiB for Horovod's build tree.
ENVIRONMENT_BYTES = 3 * GIB
CUDA_ENVIRONMENT_BYTES = 10 * GIB
BUILD_BYTES = 1 * GIB
LOG_TAIL_LINES = 25
USUAL_CUDA_HOME = Path("/usr/local/cuda")
MINIMUM_PYTHON, MAXIMUM_PYTHON = (3, 10), (3, 13)

_OTHER_TMPDIR = "export TMPDIR=<a folder with space>"
_NO_NETWORK = (
    r"NewConnectionError|Failed to establish a new connection|Temporary failure in name resolution"
    r"|Network is unreachable|ConnectTimeoutError|ReadTimeoutError|ProxyError|Connection refused|RemoteDisconnected"
    r"|from versions: none"
)

# Package of each package manager; conda, which needs no root, is the way out where none of the others is found.
_PACKAGES = {
    "apt-get": {"c++": "g++", "make": "make", "headers": "python3-dev", "venv": "python3-venv"},
    "dnf": {"c++": "gcc-c++", "make": "make", "headers": "python3-devel", "venv": "python3"},
    "zypper": {"c++": "gcc-c++", "make": "make", "headers": "python3-devel", "venv": "python3"},
    "conda": {"c++": "gxx", "make": "make", "headers": "python=3.12", "venv": "python=3.12"},
}


class SetupError(Exception):
    """Something that the user can mend: what is missing, in one sentence, and the command that brings it."""

    exit_code = 2

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(f"{what}\nTo mend it: {mend}")


def explain_failure(what: str, output: str, log: Path) -> SetupError:
    """Return the error for a failed step: no network and a full disk by name, anything else with the output's end."""
    if re.search(r"No space left on device|Disk quota exceeded", output):
        return SetupError(f"{what} failed: the disk is full.", f"delete what you can spare, or `{_OTHER_TMPDIR}`")
    if re.search(_NO_NETWORK, output):
        return SetupError(
            f"{what} failed: the package index cannot be reached.",
            "check the network and the proxy (`export https_proxy=...`), or name a mirror:"
            " python3 -m pip config set global.index-url <URL>",
        )
    tail = "\n".join(output.splitlines()[-LOG_TAIL_LINES:])
    return SetupError(f"{tail}\n{what} failed.", f"see {log}, then run {setup_command()} again")


def install_command(*needs: str) -> str:
    """Return the command that installs all `needs` (keys of `_PACKAGES`) with this machine's package manager."""
    manager = next((name for name in ("apt-get", "dnf", "zypper") if shutil.which(name)), "conda")
    names = dict.fromkeys(_PACKAGES[manager][need] for need in needs)
    if manager == "conda":
        return f"conda install -c conda-forge {' '.join(names)}"
    if manager == "apt-get":  # Debian has one package a Python version
        names = dict.fromkeys(name.replace("python3", f"python3.{sys.version_info.minor}") for name in names)
    return f"sudo {manager} install {' '.join(names)}"


def compiler_command(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the C++ compiler that CMake will take: all words of `CXX`, or the first one on PATH; empty without one."""
    given = environ.get("CXX", "").split()
    for name, *more in [given] if given else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(name)
        if path:
            return [path, *more]  # more than one: "ccache g++"
    return []


def find_cuda(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Return home and version ("13.0") of the CUDA toolkit: what is named in the environment, then nvcc on PATH."""
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    homes = [Path(environ[name]) for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    homes += [Path(nvcc).resolve().parent.parent] if nvcc else []
    for home in (*homes, USUAL_CUDA_HOME):
        # nvcc on PATH may be a wrapper script that stands far from its toolkit: the header tells.
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            version = re.search(r"release (\d+\.\d+)", output_of(str(home / "bin" / "nvcc"), "--version"))
            if version:
                return str(home), version.group(1)
    return None


def output_of(*command: str) -> str:
    """Return what `command` prints, "" if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def check_tools(*, with_build: bool, with_venv: bool) -> None:
    """Raise one `SetupError` for all that is missing to build Horovod, and to make a virtual environment."""
    missing = {}
    if with_build and not compiler_command():
        missing["c++"] = "no C++ compiler is on PATH"
    if with_build and shutil.which("make") is None:
        missing["make"] = "`make` is not on PATH"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if with_build and not header.is_file():
        missing["headers"] = f"Python's header files are missing ({header})"
    # Debian ships that part of Python apart.
    if with_venv and not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        missing["venv"] = f"{sys.executable} cannot make virtual environments"
    if missing:
        said = ", ".join(missing.values())
        why = ", and Horovod is built from source" if missing.keys() - {"venv"} else ""
        raise SetupError(f"{said[0].upper()}{said[1:]}{why}.", install_command(*missing))


def check_folders(*folders: Path) -> None:
    """Raise `SetupError` for a path with a space: MPI's compilers take what follows it for another word."""
    for folder in folders:
        if len(str(folder).split()) > 1:
            raise SetupError(
                f"There is a space in the path {folder}, and Horovod cannot be built there.",
                "move the clone, or python3 -m venv ~/hvdtrain-env && . ~/hvdtrain-env/bin/activate, then run this"
                " again; of temporary files: export TMPDIR=/tmp",
            )


def check_python(environment: Path, version: str | None) -> None:
    """Raise `SetupError` unless the environment's Python, version "3 11", is one that hvdtrain takes."""
    leave = f"`deactivate` (or `conda deactivate`), then {other_environment()}"
    if version is None:
        raise SetupError(f"The Python of the environment {environment} does not run.", f"remove it, or {leave}")
    if not MINIMUM_PYTHON <= tuple(map(int, version.split())) <= MAXIMUM_PYTHON:
        raise SetupError(
            f"The environment {environment} has Python {version.replace(' ', '.')}; hvdtrain takes 3.10 to 3.13.", leave
        )


def check_toolkit(torch: str | None, cuda: str | None) -> None:
    """Raise `SetupError` where a torch for `cuda` is installed and no CUDA toolkit is in sight."""
    if cuda and find_cuda(os.environ) is None:
        raise no_toolkit(f"is installed is {torch}, which")


def no_toolkit(which: str) -> SetupError:
    """Return the error for a CUDA build of torch without the toolkit that Horovod's build then asks for."""
    return SetupError(
        f"The torch that {which} is a CUDA build, and there is no CUDA toolkit (nvcc) to build Horovod for it.",
        "`module load cuda` or `export CUDA_HOME=<toolkit>`; for CPUs: python3 -m pip install torch --index-url"
        " https://download.pytorch.org/whl/cpu; without Horovod, for one process: HVDTRAIN_WITHOUT_HOROVOD=1",
    )


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise `SetupError` where `folder`, or its nearest existing parent, has less than `needed_bytes` free."""
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise SetupError(
            f"{folder} has {free_bytes / GIB:.1f} GiB free, and the set-up needs {needed_bytes / GIB:.1f} GiB there.",
            f"`python3 -m pip cache purge`, or, for the build's temporary files, `{_OTHER_TMPDIR}`",
        )


def host_name_problem() -> str | None:
    """Return a warning where this host's own name does not resolve: Horovod's Gloo then crashes at its start."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return (
            f"This host's own name, {name}, does not resolve; `horovodrun --gloo` will crash (MPI is not affected).\n"
            f'To mend it: echo "127.0.1.1 {name}" | sudo tee -a /etc/hosts'
        )
    return None
