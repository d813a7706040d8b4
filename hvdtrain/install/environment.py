"""The environment that a set-up makes or fills: its Python and pip, its logs, its lock, and what it was made from."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.install import preflight
from hvdtrain.install.output import tell
from hvdtrain.install.preflight import SetupError

LAUNCHER_VARIABLES = ("HOROVOD_", "OMPI_COMM_", "PMIX_", "PMI_", "MPI_LOCAL", "HYDRA_")
# A `types.py` or a `torch/` in the folder where a set-up is started is none of its business.
_NOTHING_OF_THE_USERS = "import sys; sys.path[:] = filter(None, sys.path)\n"
# Descriptors of the locks that are held: what a set-up has started keeps them where the set-up itself is killed.
held_locks: list[int] = []
_ASK_VERSION = """
import importlib.metadata as m, sys
try: print(m.version(sys.argv[1]))
except m.PackageNotFoundError: pass
"""


@dataclass(frozen=True)
class Environment:
    """The environment in `folder`: a virtual one, or conda's."""

    folder: Path

    @property
    def python(self) -> Path:
        """Return its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        """Return the file that describes the last complete set-up."""
        return self.folder / "hvdtrain-setup.json"

    def read_stamp(self) -> dict[str, str | None]:
        """Return what the last complete set-up was made from, {} if there is none."""
        try:
            stamp = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other set-ups of this environment waiting."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / "hvdtrain-setup.lock").open("w")
        except OSError as error:
            raise SetupError(
                f"{self.folder} cannot be written ({error.strerror or error}), and the environment is to be there.",
                "python3 -m venv <a folder of yours> && . <that folder>/bin/activate, then run this again",
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another set-up of this environment is running; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # Lustre as it is mounted at many sites, some NFS
                say(f"{self.folder} has no locks ({error.strerror or error}): let no other set-up of it run meanwhile")
            held_locks.append(file.fileno())
            try:
                yield
            finally:
                held_locks.remove(file.fileno())

    def run(
        self,
        what: str,
        *arguments: str,
        program: str = "",
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        keeps_lock: bool = True,
    ) -> None:
        """Run `program`, by default the environment's Python; raise `SetupError` if it fails. Output goes to a log.

        `keeps_lock`: no other set-up shall begin before it has ended, even if this one is killed.
        """
        log = self.folder / "hvdtrain-logs" / f"{re.sub(r'[^a-z0-9]+', '-', what.lower())}.log"
        log.parent.mkdir(exist_ok=True)
        command = [program or str(self.python), *arguments]
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    env=environ or safe_environ(),
                    timeout=timeout_s,
                    pass_fds=held_locks if keeps_lock else (),
                )
            except subprocess.TimeoutExpired:
                raise SetupError(f"{what} did not end within {timeout_s:.0f} s.", f"see {log}") from None
        if done.returncode != 0:
            raise preflight.explain_failure(what, log.read_text(errors="replace"), log)

    def pip(self, what: str, *arguments: str) -> None:
        """Run pip in the environment."""
        self.run(what, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)

    def ask(self, code: str, *arguments: str) -> str | None:
        """Return what Python `code` prints there, None if it fails."""
        command = [str(self.python), "-c", _NOTHING_OF_THE_USERS + code, *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    def version_of(self, package: str) -> str | None:
        """Return the installed version of `package`, None if it is not installed."""
        return self.ask(_ASK_VERSION, package) or None

    def make(self) -> None:
        """Make the environment, mend one whose making was cut short, and add pip to one without (uv makes such)."""
        is_virtual = not self.python.exists() or (self.folder / "pyvenv.cfg").exists()
        if is_virtual and not (self.python.exists() and (self.folder / "bin" / "activate").exists()):
            say(f"making {self.folder}")
            self.run("making the environment", "-m", "venv", str(self.folder), program=sys.executable)
        if self.ask("import pip._internal.cli.main") is None:
            # A pip that was cut short counts as installed: ensurepip would leave it so.
            for path in self.folder.glob("lib/python3*/site-packages/pip*"):
                shutil.rmtree(path, ignore_errors=True)
            self.run("installing pip", "-m", "ensurepip")

    def follow_move(self) -> None:
        """Make a virtual environment that was moved, or whose clone was, work where it is: its scripts name its folder.

        Where it was is what its `activate` says.
        """
        activate = self.folder / "bin" / "activate"
        text = os.fsdecode(activate.read_bytes()) if activate.exists() else ""
        named = re.search(r"VIRTUAL_ENV=(['\"/].*)", text)
        was = Path(shlex.split(named[1])[0]) if named else self.folder
        if was == self.folder or (was.exists() and was.samefile(self.folder)):  # by another name, such as a link's
            return
        say(f"this environment was made in {was}: its scripts now name {self.folder}")
        old, new = re.compile(re.escape(os.fsencode(was)) + rb"(?![\w.-])"), os.fsencode(self.folder)
        # `activate` last: one that is cut short begins anew.
        for file in sorted([*(self.folder / "bin").iterdir(), self.folder / "pyvenv.cfg"], key=activate.__eq__):
            if file.is_file() and not file.is_symlink():
                content = file.read_bytes()
                if old.search(content) and b"\0" not in content:
                    file.write_bytes(old.sub(lambda match: new, content))


def plain_environ() -> dict[str, str]:
    """Return this process's variables without what a launcher or Horovod may have left: such ranks see other ranks."""
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}


def safe_environ() -> dict[str, str]:
    """Return this process's variables, and that Python shall find no module in the working directory (from 3.11 on)."""
    return {**os.environ, "PYTHONSAFEPATH": "1"}


def say(text: str) -> None:
    """Print one line of progress."""
    tell(f"setup: {text}")
