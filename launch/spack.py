# A recipe for Spack 1.0 or newer: hvdtrain on Spack's Python, PyTorch and MPI.
#
#   spack repo create FOLDER site
#   spack repo add FOLDER/spack_repo/site  # this file: its packages/hvdtrain/package.py
#   spack install hvdtrain ^openmpi
#
# For GPUs: spack install hvdtrain ^py-torch+cuda cuda_arch=90 ^openmpi
#
# It makes a virtual environment that sees Spack's py-torch and builds Horovod for it
# (`hvdtrain setup`, which needs PyPI). Spack's own py-horovod is Horovod as released with two
# patches: without what hvdtrain/install mends, and by default without Gloo.
#
# Tried: Spack of January 2026 (1.2.0.dev0) with spack-packages of July 2026: the repository,
# `spack audit packages`, and `spack spec hvdtrain ^openmpi`, which
# takes py-torch 2.12.1, Python 3.13 and Open MPI 5.0.10. Never tried: `spack install`, and the
# line for GPUs. What it runs was run by hand, with PyPI's torch and MPICH. Of `spack style` its
# tools (black, isort, flake8) with Spack's lines of 99, not the command itself.
"""Data-parallel training of PyTorch models with Horovod."""

from spack.package import *
from spack_repo.builtin.build_systems.generic import Package


class Hvdtrain(Package):
    """Data-parallel training of PyTorch models with Horovod, from one core to an MPI cluster."""

    homepage = "https://github.com/hvdtrain/hvdtrain"
    git = "https://github.com/hvdtrain/hvdtrain.git"

    license("Apache-2.0")
    version("main", branch="main")

    depends_on("c", type="build")
    depends_on("cxx", type="build")
    depends_on("cmake@3.19:", type="build")
    depends_on("gmake", type="build")
    depends_on("python@3.10:3.13", type=("build", "run"))
    depends_on("py-pip", type="build")
    depends_on("py-torch@2.6:", type=("build", "run"))
    depends_on("mpi", type=("build", "run"))

    def install(self, spec, prefix):
        """Make the environment, and let hvdtrain build Horovod in it."""
        which("python3", required=True)("-m", "venv", "--system-site-packages", prefix)
        Executable(prefix.bin.python)("-m", "pip", "install", ".")
        with working_dir("/"):
            Executable(prefix.bin.hvdtrain)("setup")
