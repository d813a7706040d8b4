"""The steps of a set-up, in their order; each is skipped where its result is there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.install import mpi, packages, preflight
from hvdtrain.install.environment import Environment, held_locks, plain_environ, say

PACKAGE = Path(__file__).parent
SELF_CHECK_TIMEOUT_S = 180
# What setup.cfg requires beside torch, by the names that are imported.
REQUIRED = ("numpy", "rich", "safetensors", "tokenizers", "tomli_w", "tqdm")
_ASK_CUDA = "import torch; print(torch.version.cuda or '')"


@dataclass(frozen=True)
class Setup:
    """What is asked for.

    Args:
        environment: what is made or filled.
        root: the clone to install in place; None where hvdtrain came by pip.
        with_horovod: build Horovod, and an MPI for it.
        only_horovod: nothing but Horovod, what it needs to run, and MPI.
        with_tests: what launch/test.sh runs, too.
        wheel_dir: a folder that gets a copy of Horovod's wheel.
    """

    environment: Environment
    root: Path | None = None
    with_horovod: bool = True
    only_horovod: bool = False
    with_tests: bool = True
    wheel_dir: Path | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts of the requirements that are installed."""
        if self.root is None or self.only_horovod:
            return ("horovod",)
        return ("horovod", "hvdtrain", "test") if self.with_tests else ("horovod", "hvdtrain")

    @property
    def imports(self) -> list[str]:
        """Return the modules that must import in the end."""
        names = ["torch"] + ["horovod.torch", "mpi4py"] * self.with_horovod
        if not self.only_horovod:
            names += ["hvdtrain", *REQUIRED, "torchvision", "transformers"]
        return names

    def run(self) -> None:
        """Do what is missing; nothing where the last set-up still holds. Two of these wait for each other.

        Raises:
            SetupError: what is missing, and the command that brings it.
        """
        environment = self.environment
        if self.is_current():
            return
        self.check_machine()
        with environment.lock():
            if self.is_current():
                return
            start = time.monotonic()
            environment.stamp.unlink(missing_ok=True)
            environment.follow_move()
            environment.make()
            packages.install_torch(environment, self.with_horovod)
            packages.install_packages(environment, self.parts)
            if "hvdtrain" in self.parts:
                packages.install_torchvision(environment)
            elif not self.only_horovod:  # the user's own extras
                packages.declare_operators(environment)
            if self.root and not self.only_horovod:
                install_hvdtrain(environment, self.root)
            if self.with_horovod:
                mpi.install_mpi(environment)
                self.build_horovod()
                self_check(environment)
            self.check_imports()
            environment.stamp.write_text(json.dumps(self.stamp()))
            say(f"done in {time.monotonic() - start:.0f} s; environment: {environment.folder}")

    def stamp(self) -> dict[str, str | None]:
        """Return all that must be unchanged for a set-up to hold."""
        digest = hashlib.sha256()
        files = [*sorted(PACKAGE.rglob("*.py")), *sorted(PACKAGE.rglob("*.txt"))]
        for file in [*files, *([self.root / "setup.cfg"] if self.root else [])]:
            digest.update(file.read_bytes())
        environment = self.environment
        is_made = environment.python.exists()
        return {
            "root": str(self.root),
            "folder": os.path.realpath(environment.folder),
            "parts": " ".join(self.parts),
            "files": digest.hexdigest(),
            "mpi": mpi.chosen_mpi(environment) if self.with_horovod and is_made else None,
            "torch": environment.version_of("torch") if is_made else None,
            "torchvision": environment.version_of("torchvision") if is_made else None,
        }

    def is_current(self) -> bool:
        """Return whether the last set-up is complete, was made from these files, and still imports."""
        if self.wheel_dir or not self.environment.python.exists():
            return False
        if self.environment.read_stamp() != self.stamp():
            return False
        # transformers and torchvision take seconds to import, and nothing makes them stop within an environment.
        quick = [name for name in self.imports if name not in ("torchvision", "transformers")]
        return self.environment.ask(f"import {', '.join(quick)}") is not None

    def check_machine(self) -> None:
        """Raise `SetupError` for all that is missing; nothing has been downloaded or written yet."""
        environment = self.environment
        is_made = environment.python.exists()
        if self.with_horovod:
            preflight.check_folders(environment.folder, Path(tempfile.gettempdir()))
        preflight.check_tools(with_build=self.with_horovod, with_venv=not is_made)
        if is_made:
            preflight.check_python(environment.folder, environment.ask("import sys; print(*sys.version_info[:2])"))
            if self.with_horovod and environment.version_of("torch"):
                preflight.check_toolkit(environment.version_of("torch"), environment.ask(_ASK_CUDA))
        else:
            has_cuda = preflight.find_cuda(os.environ) is not None
            needed_bytes = preflight.CUDA_ENVIRONMENT_BYTES if has_cuda else preflight.ENVIRONMENT_BYTES
            preflight.check_disk_space(environment.folder, needed_bytes)
        if warning := preflight.host_name_problem():
            say(warning)
        known = ("HOROVOD_BUILD_", "HOROVOD_CUDA_HOME", "HOROVOD_NCCL_HOME")
        stray = [name for name in os.environ if name.startswith("HOROVOD_") and not name.startswith(known)]
        if stray:
            say(f"{', '.join(sorted(stray))}: set here, and left aside by the set-up; Horovod itself will heed it")

    def build_horovod(self) -> None:
        """Build and install Horovod with the environment's Python, which tells on the terminal how far it is."""
        command = [str(self.environment.python), "-m", "hvdtrain.install.build"]
        command += ["--wheel-dir", str(self.wheel_dir)] if self.wheel_dir else []
        # This very hvdtrain, wherever the user is: `-m` looks in the working directory first, unless it is told not to.
        environ = {**os.environ, "PYTHONSAFEPATH": ""}
        where = PACKAGE.parents[1]
        done = subprocess.run(command, cwd=where, env=environ, stdin=subprocess.DEVNULL, pass_fds=held_locks)
        if done.returncode != 0:
            sys.exit(done.returncode)  # it has said why

    def check_imports(self) -> None:
        """Raise `SetupError` unless all that was installed imports."""
        for name in self.imports:
            if name == "torchvision" and self.environment.version_of("torchvision") is None:
                continue  # none for this torch, as was said, or none asked for
            if name == "transformers" and self.environment.version_of("transformers") is None:
                continue  # none for this Python, or none asked for
            self.environment.run(f"importing {name}", "-c", f"import {name}")


def install_hvdtrain(environment: Environment, root: Path) -> None:
    """Install the clone in place; a copy of it where the clone, in which pip leaves its notes, cannot be written."""
    options = ["install", "--no-deps", "--no-build-isolation"]
    if os.access(root, os.W_OK):
        environment.pip("hvdtrain", *options, "--editable", str(root))
        return
    say(f"{root} cannot be written: a copy of hvdtrain is installed, which later changes of the clone do not reach")
    with tempfile.TemporaryDirectory(prefix="hvdtrain-clone-") as folder:
        copy = Path(folder) / "hvdtrain"
        shutil.copytree(root / "hvdtrain", copy / "hvdtrain", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
            if (root / name).exists():
                shutil.copy(root / name, copy / name)
        environment.pip("hvdtrain", *options, "--force-reinstall", str(copy))


def self_check(environment: Environment) -> None:
    """Run one all-reduce on two ranks with the command that users will use."""
    say("checking two ranks")
    # Without its cache, whose folder is HOME: that may be anything.
    ranks = ["--disable-cache", "-np", "2", str(environment.python), str(PACKAGE / "selfcheck.py")]
    horovodrun = str(environment.folder / "bin" / "horovodrun")
    environ = plain_environ()
    what = "The check with two ranks"
    limit_s = SELF_CHECK_TIMEOUT_S
    environment.run(what, *ranks, program=horovodrun, environ=environ, timeout_s=limit_s, keeps_lock=False)
