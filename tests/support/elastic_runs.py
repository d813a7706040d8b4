"""A supervised run on hosts that come and go, and what became of each sample."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

RECIPE = Path(__file__).with_name("elastic_recipe.py")
REPOSITORY = RECIPE.parents[2]


class ElasticRun:
    """Started on `node1` of some `Hosts`; the list of hosts is a file that its hosts script prints."""

    def __init__(self, hosts, folder, listed, options=(), settings=(), launcher=(), supervisor="node1"):
        """Start it.

        Args:
            hosts: `Hosts` that are up.
            folder: an empty one, for all files.
            listed: names of hosts at first.
            options: more of `supervise`.
            settings: more of the recipe.
            launcher: words of the command before the training's; without any it is mpirun's.
            supervisor: the host on which `supervise` runs.
        """
        self.folder, self.run_dir = folder, folder / "run"
        self.seen, self.list, self.script = folder / "seen", folder / "hosts", folder / "hosts.sh"
        self.seen.mkdir()
        self.script.write_text(f"#!/bin/sh\ncat {self.list}\n")
        self.script.chmod(0o755)
        self.set_listed(listed)
        kept = ["PYTHONPATH", "OMP_NUM_THREADS", "SEEN", "OMPI_MCA_mpi_yield_when_idle"]
        forwarded = [word for name in kept for word in ("-x", name)]
        network = ["--mca", "btl_tcp_if_include", "eth0"]
        mpirun = ["mpirun", "-np", "{ranks}", "-H", "{hosts}", "--bind-to", "none", *network, *forwarded]
        train = [sys.executable, "-m", "hvdtrain", "train", RECIPE, "--run-dir", self.run_dir, *settings]
        supervise = [sys.executable, "-m", "hvdtrain", "supervise", "--hosts-script", self.script, *options]
        variables = {
            "PYTHONPATH": REPOSITORY,
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "SEEN": self.seen,
            **dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"),
        }
        words = [*supervise, "--", *(launcher or mpirun), *train]
        self.process = subprocess.Popen(
            hosts.command(supervisor, [str(word) for word in words], **variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines = []
        """(seconds, text) of each line of output."""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def set_listed(self, names):
        """From now on the hosts script prints these, with a slot each."""
        new = self.list.with_suffix(".new")
        new.write_text("".join(f"{name}:1\n" for name in names))
        new.replace(self.list)

    def said(self, text):
        """Return when a line with this text was printed first, None where there is none."""
        return next((then for then, line in [*self.lines] if text in line), None)

    def output(self):
        """Return all that was printed."""
        return "".join(line for _, line in [*self.lines])

    def steps(self):
        """Return {start: {step: [(seconds, samples) of each rank, ...]}}."""
        return steps_in(self.seen)

    def reached(self):
        """Return the last step that any start has taken."""
        return max((step for steps in self.steps().values() for step in steps), default=0)

    def wait_for(self, condition, what, seconds=300):
        """Wait until something is true; raises TimeoutError, with the output, where it never is."""
        deadline = time.monotonic() + seconds
        while not condition():
            code = self.process.poll()
            if time.monotonic() > deadline or (code is not None and not condition()):
                raise TimeoutError(f"{what} did not happen (exit code {code}):\n{self.output()[-6000:]}")
            time.sleep(0.05)
        return time.time()

    def wait_for_step(self, step, seconds=300):
        """Wait until a step is taken."""
        return self.wait_for(lambda: self.reached() >= step, f"step {step}", seconds)

    def end(self, seconds=240):
        """Wait for the end; returns the exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def signal(self, number):
        """Send a signal to the supervisor."""
        os.kill(self.pid(), number)

    def pid(self):
        """Return the supervisor's process id here: nsenter has become it, or its parent."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else self.process.pid

    def kill(self):
        """End what may be left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join(10)
        self.process.stdout.close()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append((time.time(), line))


def steps_in(seen):
    """Return {start: {step: [(seconds, samples) of each rank, ...]}} of the files that ranks have made."""
    starts = {}
    for path in sorted(seen.iterdir()):
        steps = starts.setdefault(int(path.name.partition("-")[0]), {})
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else it is just being written
                step, then, *samples = line.split()
                steps.setdefault(int(step), []).append((float(then), [*map(int, samples)]))
    return starts


def compare_samples(starts, expected):
    """Return how many steps were taken again, once each step's samples are seen to be the expected ones.

    Args:
        starts: of a run that was disturbed, as `ElasticRun.steps` returns them.
        expected: {step: [sample, ...]} of one that was not.
    """
    complete, again = set(), 0
    for _, steps in sorted(starts.items()):
        for step, parts in sorted(steps.items()):
            samples = [sample for _, part in parts for sample in part]
            if len(samples) < len(expected[step]):  # a rank was lost between this step and its note
                assert step == max(steps), f"step {step} lacks samples, and the next one was taken"
                assert set(samples) < set(expected[step])
            else:
                assert samples == expected[step], f"step {step} has had other samples"
                again += step in complete
                complete.add(step)
    assert complete == expected.keys(), f"steps {sorted(expected.keys() - complete)[:10]} were never taken"
    return again
