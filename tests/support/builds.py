"""What the tests of the set-up share: a build to start from, programs that are shell scripts, an MPI of such."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pip

from hvdtrain.install.recipe import Gpu, Mpi, Recipe, Torch

CPU_TORCH = Torch("2.13.0+cpu", "", "abc", "/environment/torch")
CUDA_TORCH = Torch("2.14.1", "13.0", "abc", "/environment/torch")
GPU = Gpu("/cuda", "13.0", "/nccl/include", "/nccl/lib/libnccl.so.2", "80,90")
RECIPE = Recipe(CPU_TORCH, Mpi("wheel: 5.0.11"), None, 17, "g++ 12.2.0", ())


def script(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def fake_mpi(folder: Path) -> None:
    script(folder / "mpirun", "echo 'mpirun (Open MPI) 4.1.4'; echo more")
    script(folder / "mpicc", "echo '-L/opt/mpi/lib -L/opt/mpi/hwloc -Wl,-rpath -Wl,/opt/mpi/lib -lmpi'")


def make_environment(folder: Path) -> Path:
    """Make a virtual environment with this one's pip, in a tenth of the time of ensurepip; return its packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    (packages,) = folder.glob("lib/python3*/site-packages")
    source = Path(pip.__file__).parent
    shutil.copytree(source, packages / "pip")
    (record,) = source.parent.glob(f"pip-{pip.__version__}.dist-info")
    shutil.copytree(record, packages / record.name)
    return packages


def check_lock(lock) -> None:
    """Hold the lock that `lock()` returns: a second thread must wait for it, and get it in the end."""
    entered = threading.Event()

    def second():
        with lock():
            entered.set()

    with lock():
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(60)
    assert entered.is_set()
