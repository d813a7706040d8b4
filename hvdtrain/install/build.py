"""Build Horovod for the torch and the MPI of the environment that runs this file, and install it there.

Wheels are kept in the XDG cache under a key of everything that makes them differ; one is built at a time per key.
Run by `hvdtrain.install` with the environment's own Python, its bin folder first on PATH.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from hvdtrain.install import recipe as recipes
from hvdtrain.install.clone import other_environment
from hvdtrain.install.output import tell
from hvdtrain.install.preflight import BUILD_BYTES, SetupError, check_disk_space, compiler_command, explain_failure
from hvdtrain.install.recipe import HOROVOD_VERSION, SDIST_SHA256, Gpu, Recipe, Torch

MINIMUM_TORCH = (2, 6)
_ASK_TORCH = """
import json, torch
capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
print(json.dumps([torch.__version__, torch.version.cuda or "", torch.version.git_version or "",
                  torch.__path__[0], ",".join(sorted({f"{major}{minor}" for major, minor in capabilities}))]))
"""
_ASK_HOROVOD = """
import json, horovod.torch as hvd
print(json.dumps({"MPI": hvd.mpi_built(), "Gloo": hvd.gloo_built(), "NCCL": bool(hvd.nccl_built())}))
"""


def detect_recipe() -> Recipe:
    """Look at this environment and return the build that it needs."""
    version, cuda, git, folder, capabilities = json.loads(_run_python(_ASK_TORCH))
    torch = Torch(version, cuda, git, folder)
    check_torch_version(version)
    gpu = recipes.find_gpu(torch, os.environ, _nccl_folders(), capabilities or "80,90")
    standard = recipes.torch_cxx_standard(Path(folder) / "include")
    settings = recipes.build_settings(os.environ, recipes.cpu_flags())
    mpi = recipes.find_mpi(Path(sys.executable).parent)
    return Recipe(torch, mpi, gpu, standard, recipes.describe_compiler(), settings)


def check_torch_version(version: str) -> None:
    """Raise `SetupError` for a torch older than the oldest that the tests were run with."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_TORCH:
        wanted = ".".join(map(str, MINIMUM_TORCH))
        raise SetupError(
            f"torch {version} is installed, and hvdtrain needs {wanted} or newer.",
            f"python3 -m pip install --upgrade 'torch>={wanted}', or `deactivate`, then {other_environment()}",
        )


def check_compiler_standard(standard: int) -> None:
    """Raise `SetupError` unless the compiler takes the C++ standard that torch's headers demand."""
    compiler = compiler_command() or ["c++"]
    command = [*compiler, f"-std=c++{standard}", "-x", "c++", "-fsyntax-only", "-"]
    probe = "#include <optional>\nint main() { return std::optional<int>(0).value(); }\n"
    if subprocess.run(command, input=probe, text=True, capture_output=True, check=False).returncode != 0:
        raise SetupError(
            f"{' '.join(compiler)} cannot compile C++{standard}, which the headers of the installed torch demand.",
            "`module load gcc`, or conda install -c conda-forge gxx, then `export CXX=<the newer compiler>`",
        )


class WheelCache:
    """Wheels by key. An entry is a folder that appears whole, by a rename, and is checked again at each use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the entry `key` for this process alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{key}.lock").open("w") as file:
            with contextlib.suppress(OSError):  # none on this file system: at worst one is built twice
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def find(self, key: str) -> Path | None:
        """Return the wheel of `key`, or None; an entry that is not what was stored is dropped."""
        entry = self.folder / key
        wheels = list(entry.glob("*.whl"))
        digest = entry / "sha256"
        if len(wheels) == 1 and digest.is_file() and digest.read_text() == sha256(wheels[0]):
            return wheels[0]
        self.drop(key)
        return None

    def store(self, key: str, wheel: Path) -> Path:
        """Copy `wheel` to the entry `key` and return the copy."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".store-") as temporary:
            whole = Path(temporary) / "entry"
            whole.mkdir()
            shutil.copy(wheel, whole)
            (whole / "sha256").write_text(sha256(wheel))
            if not (self.folder / key).exists():
                whole.rename(self.folder / key)
        return self.folder / key / wheel.name

    def drop(self, key: str) -> None:
        """Remove the entry `key`, if there is one."""
        shutil.rmtree(self.folder / key, ignore_errors=True)


@contextlib.contextmanager
def open_cache() -> Iterator[WheelCache]:
    """Enter with this user's cache, `$XDG_CACHE_HOME/hvdtrain/wheels`; where that cannot be written, a passing one."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "hvdtrain" / "wheels"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: no HOME, and no such user
        tell(f"Horovod's wheel is not kept for the next time ({error}); `export XDG_CACHE_HOME=<folder>` keeps it.")
        with tempfile.TemporaryDirectory(prefix="hvdtrain-cache-") as temporary:
            yield WheelCache(Path(temporary))
    else:
        yield WheelCache(folder)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a small file, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def install(recipe: Recipe, cache: WheelCache) -> None:
    """Install the wheel of `recipe`, from the cache or newly built; a cached one that does not work is built anew."""
    with cache.lock(recipe.key):
        wheel = cache.find(recipe.key)
        if wheel is not None:
            tell(f"Horovod {HOROVOD_VERSION}: from the cache, {wheel}")
            try:
                install_wheel(wheel, recipe)
                return
            except SetupError as error:
                tell(f"The cached wheel does not work ({error}); building it anew.")
                cache.drop(recipe.key)
        with tempfile.TemporaryDirectory(prefix="hvdtrain-build-") as folder:
            wheel = build_wheel(recipe, Path(folder))
            install_wheel(wheel, recipe)
            cache.store(recipe.key, wheel)  # after the check: what does not work is never cached


def install_wheel(wheel: Path, recipe: Recipe) -> None:
    """Install `wheel` over any other Horovod and check that it offers what was asked for."""
    _logged("installation", ["-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", str(wheel)])
    built = json.loads(_run_python(_ASK_HOROVOD))
    asked = {"MPI": True, "Gloo": True, "NCCL": recipe.gpu is not None}
    if built != asked:
        raise SetupError(f"Horovod was built with {built} instead of {asked}.", "read the build log and run this again")


def build_wheel(recipe: Recipe, folder: Path) -> Path:
    """Download Horovod's source distribution to `folder`, edit it, build it and return the wheel."""
    check_disk_space(folder, BUILD_BYTES)
    check_compiler_standard(recipe.cxx_standard)
    jobs = recipes.available_cores()
    kind = f"CUDA {recipe.gpu.cuda_version} and NCCL" if recipe.gpu else "CPU"
    tell(
        f"Horovod {HOROVOD_VERSION}: building for torch {recipe.torch.version}, {kind}, {recipe.mpi.version},"
        f" C++{recipe.cxx_standard}, {jobs} jobs; about {8 // jobs + 1} minutes, log in {log_file('build')}"
    )
    start = time.monotonic()
    source = unpack_sdist(download_sdist(folder), folder)
    for edit in recipe.edits():
        edit.apply(source)
    nccl_home = folder / "nccl"
    if recipe.gpu:
        link_nccl(recipe.gpu, nccl_home)
    # pip's own cache is off: it knows nothing of HOROVOD_* and would hand out a wheel that was built otherwise.
    options = ["--no-deps", "--no-index", "--no-cache-dir", "--no-build-isolation", "--wheel-dir", str(folder)]
    command = ["-m", "pip", "wheel", "-v", *options, str(source)]
    _logged("build", command, recipe.environment(os.environ, jobs, nccl_home))
    (wheel,) = folder.glob("*.whl")
    check_wheel(wheel, source, recipe)
    tell(f"Horovod {HOROVOD_VERSION}: built in {time.monotonic() - start:.0f} s, {wheel.stat().st_size / 1e6:.1f} MB")
    return wheel


def download_sdist(folder: Path) -> Path:
    """Fetch the source distribution with pip, so that the user's index, mirror and proxy are heeded; check its digest.

    An environment variable of pip's may have put a tar ball into a local folder: the digest decides.
    """
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder)]
    _logged("download", ["-m", "pip", "download", *options, f"horovod=={HOROVOD_VERSION}"])
    sdist = folder / f"horovod-{HOROVOD_VERSION}.tar.gz"
    if not sdist.is_file() or sha256(sdist) != SDIST_SHA256:
        raise SetupError(
            f"The package index did not serve Horovod {HOROVOD_VERSION} as it was released (SHA-256 differs).",
            "python3 -m pip config list, and see whether a mirror has altered it",
        )
    return sdist


def unpack_sdist(sdist: Path, folder: Path) -> Path:
    """Unpack to `folder` and return the sources' own folder."""
    with tarfile.open(sdist) as archive:
        # Not yet in Python 3.10.0 to 3.10.11; the digest was checked.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder, **safe)  # type: ignore[arg-type]
    return folder / f"horovod-{HOROVOD_VERSION}"


def check_wheel(wheel: Path, source: Path, recipe: Recipe) -> None:
    """Raise `SetupError` if the wheel is not for the installed torch, or Gloo or torch's part had another standard."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read("horovod/metadata.json").decode() if "horovod/metadata.json" in names else "{}"
    problems = []
    if not any(re.fullmatch(r"horovod/torch/mpi_lib_v2\..*so", name) for name in names):
        problems.append("it has no part for PyTorch")
    if json.loads(metadata).get("pytorch") != recipe.torch.version:
        problems.append(f"it was built for another torch: {metadata}")
    for target in ("pytorch", "gloo"):
        flags = [file.read_text() for file in source.glob(f"build/**/{target}.dir/flags.make")]
        # The last one counts; Gloo puts a -std=c++11 of its own before it.
        standards = [re.findall(r"-std=(?:c|gnu)\+\+(\w+)", text)[-1:] for text in flags]
        if standards != [[str(recipe.cxx_standard)]]:
            problems.append(f"{target} was compiled for C++ {standards}, not {recipe.cxx_standard}")
    if problems:
        raise SetupError(f"Horovod's build is not what was asked for: {'; '.join(problems)}.", "report this, please")


def link_nccl(gpu: Gpu, home: Path) -> None:
    """Lay out NCCL as Horovod looks for it; NVIDIA's wheel lacks the library's plain name."""
    (home / "lib").mkdir(parents=True)
    (home / "include").symlink_to(gpu.nccl_include)
    (home / "lib" / "libnccl.so").symlink_to(gpu.nccl_library)


def log_file(step: str) -> Path:
    """Return the log of a step: a file of the environment, so that it outlives the build's folder."""
    return Path(sys.prefix) / "hvdtrain-logs" / f"horovod-{step}.log"


def _nccl_folders() -> list[Path]:
    named = [Path(os.environ[name]) for name in ("HOROVOD_NCCL_HOME", "NCCL_HOME") if os.environ.get(name)]
    try:
        wheel = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        wheel = None
    in_wheel = [Path(path) for path in wheel.submodule_search_locations or ()] if wheel else []
    return [*named, *in_wheel, Path("/usr/local"), Path("/usr")]


def _run_python(code: str) -> str:
    """Return what `code` prints in a Python of its own; raise `SetupError` with its last line if it fails."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = next(iter(reversed(done.stderr.splitlines())), f"exit code {done.returncode}")
        raise SetupError(f"A check of this environment failed: {last}", "remove the environment and run this again")
    return done.stdout.splitlines()[-1]


def _logged(step: str, arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """Run this Python with `arguments`, its output to the step's log; raise `SetupError` with the log's end."""
    log = log_file(step)
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode != 0:
        raise explain_failure(f"Horovod's {step}", log.read_text(errors="replace"), log)


def main(wheel_dir: Path | None) -> None:
    """Install Horovod in this environment, and copy its wheel to `wheel_dir`."""
    recipe = detect_recipe()
    with open_cache() as cache:
        install(recipe, cache)
        wheel = cache.find(recipe.key)
        if wheel_dir and wheel:
            wheel_dir.mkdir(parents=True, exist_ok=True)
            tell(f"Horovod {HOROVOD_VERSION}: the wheel is {shutil.copy(wheel, wheel_dir)}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[2]) if sys.argv[1:2] == ["--wheel-dir"] else None)
    except SetupError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
