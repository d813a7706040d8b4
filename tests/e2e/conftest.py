"""Start real commands as a user would, each with an outer time limit: a launcher may hang, a test may not."""

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvdtrain.process.session import session_folder

REPOSITORY = Path(__file__).parents[2]
FAULTY = REPOSITORY / "tests" / "support" / "faulty_recipe.py"
BIN = Path(sys.executable).parent

LAUNCHERS = {
    "horovodrun-mpi": ["horovodrun", "-np", "{n}"],
    "horovodrun-gloo": ["horovodrun", "--gloo", "-np", "{n}"],
    "mpirun": ["mpirun", "--oversubscribe", "-np", "{n}"],
}


@dataclass
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def text(self):
        return self.out + self.err


def environment(**more):
    """Return this process's environment without what a launcher or an earlier test may have left in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMPI_COMM", "PMIX", "PMI_", "HOROVOD_")) and name != "OMP_NUM_THREADS"
    }
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    return {**kept, "PATH": path, "PYTHONPATH": str(REPOSITORY), **root, **more}


def processes_naming(folder):
    """Return the ids of the processes whose command line names a folder; `ps` would cut the lines to the terminal."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            if os.fsencode(str(folder)) in path.read_bytes():  # one that is dead and not yet asked for has none
                found.append(int(path.parent.name))
    return found


def run_to_end(*command, cwd, timeout=120, **env):
    """Run a command, in a process group of its own that ends with it."""
    with session_folder() as for_launcher:  # not that of a killed one with the same number
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env={**for_launcher, **environment(**env)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, err = process.communicate()
            pytest.fail(f"no end after {timeout} s: {command}\n{out[-5000:]}\n{err[-5000:]}")
    return Done(process.returncode, out, err)


@pytest.fixture
def run(tmp_path):
    """Run a command in an empty directory."""

    def run(*command, timeout=120, cwd=tmp_path, **env):
        return run_to_end(*command, cwd=cwd, timeout=timeout, **env)

    return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run of the faulty recipe on two ranks that nothing happens to; copy it, or look and do not touch."""
    folder = tmp_path_factory.mktemp("whole")
    launch = [word.format(n=2) for word in LAUNCHERS["mpirun"]]
    done = run_to_end(*launch, sys.executable, "-m", "hvdtrain", "train", FAULTY, "--run-dir", "run", cwd=folder)
    assert done.code == 0, done.text
    return folder / "run"


@pytest.fixture
def start(tmp_path):
    """Start a command in the background; whatever is left of its process group ends with the test."""
    started = []
    folders = contextlib.ExitStack()

    def start(*command, **env):
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=tmp_path,
            env={**folders.enter_context(session_folder()), **environment(**env)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    with folders:
        yield start
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.communicate(timeout=30)


@pytest.fixture
def hvdtrain(run):
    """Run `python -m hvdtrain ...`, on `ranks` ranks by `launcher` or alone."""

    def hvdtrain(*arguments, launcher=None, ranks=1, **more):
        start = [word.format(n=ranks) for word in LAUNCHERS[launcher]] if launcher else []
        return run(*start, sys.executable, "-m", "hvdtrain", *arguments, **more)

    return hvdtrain


@pytest.fixture
def called(tmp_path, monkeypatch, capsys):
    """Run a command line in this process, which has imported torch already: where one of its own proves no more."""

    def called(*arguments, cwd=tmp_path):
        from hvdtrain.cli import main

        before = dict(os.environ)
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        try:
            code = main([str(word) for word in arguments])
        except SystemExit as leaving:
            code = leaving.code
        finally:
            os.environ.clear()
            os.environ.update(before)  # without what a start sets for its process
        return Done(code, *capsys.readouterr())

    return called


@pytest.fixture(scope="session")
def small_text(tmp_path_factory):
    """Real text, a little of it: a few modules of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    for module in ("ast", "argparse", "shutil", "tarfile"):
        source = Path(sys.modules["os"].__file__).with_name(f"{module}.py")
        (folder / f"{module}.py").write_text(source.read_text()[:20_000])
    return folder


@pytest.fixture
def tiny_lm(small_text, tmp_path):
    """Arguments that make the default recipe a matter of seconds."""
    return [
        *(
            "train",
            "lm",
            "--data.path",
            small_text,
            "--data.cache-dir",
            tmp_path / "cache",
            "--data.sequence-length",
            "64",
        ),
        *("--model.num-layers", "1", "--model.hidden-size", "32", "--model.num-heads", "2"),
        *("--train.global-batch-size", "8", "--optim.warmup-steps", "2", "--log.every", "5"),
        *("--eval.every", "10", "--checkpoint.every", "10"),
    ]
