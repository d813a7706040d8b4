# A recipe for Spack: hvdtrain on Spack's Python, PyTorch and MPI.
#
#   spack repo create site      # and copy this file to packages/hvdtrain/package.py in the folder of the new repo.yaml
#   spack repo add FOLDER_OF_REPO_YAML && spack install hvdtrain ^openmpi
#
# It makes a virtual environment that sees Spack's py-torch and builds Horovod for it (`hvdtrain setup`); py-horovod of
# Spack's own does not build with torch 2.1 or newer.
#
# Spack 1.0 or newer. Never tried: no Spack was at hand. Tried: its commands, by hand, with PyPI's torch and MPICH; and
# what it names was looked up in spack-packages of 2026-07-01: each package is there, PyTorch 2.6 to 2.12 among them.
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
        which("python3")("-m", "venv", "--system-site-packages", prefix)
        Executable(prefix.bin.python)("-m", "pip", "install", ".")
        with working_dir("/"):
            Executable(prefix.bin.hvdtrain)("setup")
