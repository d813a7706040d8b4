"""For all tests: one thread a test process, and a test that leaves anything behind fails.

Several test processes share the cores, and small tensors gain nothing from more threads.
"""

import os
import threading
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers would look for every model at home

SECONDS_TO_END = 30  # for threads and processes that were asked to, on a machine that is busy
# What pytest and Python keep where they run, and what a tool of another lane may write meanwhile.
CACHES = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
# What pytest, torch's compiler, OpenMP and tokenizers set when they are first used.
KNOWN_VARIABLES = ("PYTEST_", "TORCHINDUCTOR_", "TRITON_", "KMP_", "TOKENIZERS_PARALLELISM")
# Daemons that are started once and end with the process: tqdm's monitor, the pool of torch's compiler, our reader.
# Those of torch's compiler and autograd stay; "Dummy" is one of theirs that has run Python, as it has on GPUs.
KNOWN_THREADS = ("TMonitor", "SubprocPool", "InductorSubproc", "subproc_worker_timer", "Dummy", "hvdtrain-data")
KNOWN_PROCESSES = ("multiprocessing.resource_tracker", "torch/_inductor/compile_worker")


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Fail a test that leaves environment variables, threads, child processes or files in the working directory.

    What fixtures of a module or of the session hold was there before; what the test's own hold has ended by now.
    """
    before = Traces()
    yield
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := Traces().since(before)) and time.monotonic() < deadline and not left.is_lasting:
        time.sleep(0.02)
    if left:
        left.remove(before)
        pytest.fail(f"this test leaves behind: {left}")


class Traces:
    """What a test could leave behind, as it is now."""

    def __init__(self):
        self.directory = Path.cwd()
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(KNOWN_VARIABLES)}
        self.threads = {thread for thread in threading.enumerate() if not is_known(thread)}
        self.processes = children()
        self.files = {path.name for path in self.directory.iterdir() if not path.name.startswith(".venv")} - CACHES

    def since(self, before):
        return Difference(before, self)


class Difference:
    """What is there now and was not before."""

    def __init__(self, before, now):
        names = before.variables.keys() | now.variables.keys()
        changed = sorted(name for name in names if before.variables.get(name) != now.variables.get(name))
        self.variables = [f"variable {name}={now.variables.get(name)!r}" for name in changed]
        self.files = [f"file {now.directory / name}" for name in sorted(now.files - before.files)]
        self.directory = [] if now.directory == before.directory else [f"working directory {now.directory}"]
        if self.directory:
            self.files = []
        self.threads = [f"thread {thread.name}" for thread in now.threads - before.threads]
        new = now.processes.keys() - before.processes.keys()
        self.processes = [f"process {number} ({now.processes[number]})" for number in sorted(new)]

    @property
    def is_lasting(self):
        """Whether some of it will not go away by itself."""
        return bool(self.variables or self.files or self.directory)

    def __bool__(self):
        return self.is_lasting or bool(self.threads or self.processes)

    def __str__(self):
        return ", ".join(self.variables + self.files + self.directory + self.threads + self.processes)

    def remove(self, before):
        """Keep the next tests from what can be mended: variables and the working directory."""
        for name in [*os.environ]:
            if name not in before.variables and not name.startswith(KNOWN_VARIABLES):
                del os.environ[name]
        os.environ.update(before.variables)
        os.chdir(before.directory)


def is_known(thread):
    return any(name in f"{thread.name} {type(thread).__name__}" for name in KNOWN_THREADS)


def children():
    """Return number and command of each child process of this one, zombies aside."""
    found = {}
    for listed in Path("/proc/self/task").glob("*/children"):
        try:
            numbers = listed.read_text().split()
        except OSError:  # the thread has ended
            continue
        for number in numbers:
            command = command_of(number)
            if command and not any(name in command for name in KNOWN_PROCESSES):
                found[int(number)] = command[:100]
    return found


def command_of(number):
    """Return the command of a process, empty where it has ended; one that is just being started has none as yet."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        try:
            command = Path("/proc", number, "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            state = Path("/proc", number, "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""
        if command or state in "ZX":
            return command
        time.sleep(0.001)
    return "(no command)"
