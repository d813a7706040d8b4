"""What a set-up needs of the machine, looked at before anything is downloaded.

Whatever is missing becomes one sentence and the command that mends it. Standard library only, any Python since 3.10.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import sys
import sysconfig
from pathlib import Path

GIB = 2**30
# Measured with torch 2.13.0: 1.6 GiB of packages (CPU) or 7 GiB (CUDA), and 0.3 GiB for Horovod's build tree.
ENVIRONMENT_BYTES = 3 * GIB
CUDA_ENVIRONMENT_BYTES = 10 * GIB
BUILD_BYTES = 1 * GIB
LOG_TAIL_LINES = 25

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
    return SetupError(f"{tail}\n{what} failed.", f"see {log}, then run launch/setup.sh again")


def install_command(need: str) -> str:
    """Return the command that installs `need` (a key of `_PACKAGES`) with this machine's package manager."""
    for manager in ("apt-get", "dnf", "zypper"):
        if shutil.which(manager):
            package = _PACKAGES[manager][need]
            if manager == "apt-get" and need in ("headers", "venv"):  # Debian has one package a Python version
                package = package.replace("python3", f"python3.{sys.version_info.minor}")
            return f"sudo {manager} install {package}"
    return f"conda install -c conda-forge {_PACKAGES['conda'][need]}"


def find_compiler(environ: dict[str, str] | os._Environ[str] = os.environ) -> str | None:
    """Return the C++ compiler that CMake will take: `CXX`, or the first one on PATH."""
    candidates = [environ["CXX"].split()[0]] if environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def check_tools() -> None:
    """Raise `SetupError` without a C++ compiler, make, or Python's header files."""
    if find_compiler() is None:
        raise SetupError("No C++ compiler is on PATH, and Horovod is built from source.", install_command("c++"))
    if shutil.which("make") is None:
        raise SetupError("`make` is not on PATH, and Horovod is built from source.", install_command("make"))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise SetupError(f"Python's header files are missing ({header}).", install_command("headers"))


def check_venv_module() -> None:
    """Raise `SetupError` where Python cannot make virtual environments (Debian ships that part apart)."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(f"{sys.executable} cannot make virtual environments.", install_command("venv"))


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
