"""What Horovod's own elastic driver does with a run that loses a worker: which samples it sees twice, and never.

    python benchmarks/horovod_elastic.py --output benchmarks/results/horovod_elastic.txt

`horovodrun` with a discovery script, Gloo and three workers on this machine, each called a host of its own, and a
program as Horovod's documentation has it: `hvd.elastic.run`, `TorchState`, `ElasticSampler`, a commit every few
batches. In mid-epoch one worker is killed, or its host is listed no more, or a further host is, or a worker is stopped
by SIGSTOP. What each worker has trained on is written down batch by batch. A batch whose work was lost because it was
not committed is not counted as seen twice: its weights are gone. `benchmarks/elastic.py` does the like to `hvdtrain
supervise`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

SAMPLES, BATCH, COMMIT = 360, 4, 5
ALIASES = ("localhost", "127.0.0.1", os.uname().nodename)
WAYS = ("nothing", "killed", "left", "grown", "stopped")


def worker() -> None:
    """Train for one epoch, as Horovod's documentation has it, and note what is seen."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    model = torch.nn.Linear(1, 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters())
    data = list(range(SAMPLES))
    sampler = hvd.elastic.ElasticSampler(data, shuffle=False)
    state = hvd.elastic.TorchState(model, optimizer, sampler=sampler, batch=0, steps=0)
    log = Path(os.environ["SEEN"]) / f"worker-{os.getpid()}"

    @hvd.elastic.run
    def train(state: hvd.elastic.TorchState) -> None:
        loader = torch.utils.data.DataLoader(data, batch_size=BATCH, sampler=state.sampler)
        for batch, samples in enumerate(loader):
            optimizer.zero_grad()
            model(samples.float()[:, None]).square().mean().backward()
            optimizer.step()
            state.steps += 1
            state.sampler.record_batch(batch, BATCH)
            with log.open("a") as file:
                numbers = " ".join(map(str, samples.tolist()))
                file.write(f"{time.time()} {state.steps} {hvd.size()} {numbers}\n")
            time.sleep(float(os.environ["PAUSE"]))
            if state.steps % COMMIT == 0:
                state.commit()

    train(state)
    hvd.shutdown()


class Run:
    """One launch of horovodrun, and what happens to it."""

    def __init__(self, given: argparse.Namespace, folder: Path, way: str) -> None:
        self.given, self.folder, self.way = given, folder, way
        self.seen = folder / "seen"
        self.seen.mkdir(parents=True)
        self.hosts(ALIASES[:2] if way == "grown" else ALIASES)
        script = folder / "hosts.sh"
        script.write_text(f"#!/bin/sh\ncat {folder / 'hosts'}\n")
        script.chmod(0o755)
        environ = os.environ | {"SEEN": str(self.seen), "PAUSE": str(given.pause), "PYTHONPATH": str(REPOSITORY)}
        command = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "--network-interfaces", "lo"]
        command += ["-np", str(len(ALIASES) - (way == "grown")), "--min-np", "1", "--max-np", "3"]
        command += ["--host-discovery-script", str(script), sys.executable, __file__, "--worker"]
        self.output = (folder / "output").open("w")
        self.process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
        )

    def hosts(self, names: tuple[str, ...]) -> None:
        """List these hosts."""
        new = self.folder / "hosts.new"
        new.write_text("".join(f"{name}:1\n" for name in names))
        new.replace(self.folder / "hosts")

    def batches(self) -> dict[int, list[tuple[float, int, int, list[int]]]]:
        """Return what each worker has trained on: when, the state's step, the number of workers, the samples."""
        found = {}
        for file in self.seen.iterdir():
            lines = [line.split() for line in file.read_text().splitlines()]
            found[int(file.name.partition("-")[2])] = [
                (float(then), int(step), int(size), [*map(int, numbers)]) for then, step, size, *numbers in lines
            ]
        return found

    def wait_for(self, steps: int, seconds: float) -> bool:
        """Wait until some worker has got so far; returns whether that came about."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if any(lines and lines[-1][1] >= steps for lines in self.batches().values()):
                return True
            time.sleep(0.2)
        return False

    def watch(self) -> str:
        """Let it happen, wait for the end, and return the row."""
        happened, victim = 0.0, 0
        if self.wait_for(12, 90) and self.way != "nothing":
            happened = time.time()
            if self.way == "grown":
                self.hosts(ALIASES)
            elif self.way == "left":
                self.hosts(ALIASES[:2])
            else:
                victim = max(self.batches())
                os.kill(victim, signal.SIGKILL if self.way == "killed" else signal.SIGSTOP)
        try:
            self.process.wait(self.given.seconds)
            end = f"exit code {self.process.returncode}"
            if self.process.returncode:
                print((self.folder / "output").read_text()[-1500:], file=sys.stderr)
        except subprocess.TimeoutExpired:
            end = f"no end after {self.given.seconds:g} s"
        batches = self.batches()
        times = [happened, *sorted(then for lines in batches.values() for then, *_ in lines if then > happened)]
        longest = max((later - before for before, later in pairwise(times)), default=0.0)
        pause = f"{longest - self.given.pause:.1f}" if happened else ""
        if self.way == "stopped":
            pause = f"> {time.time() - max(then for lines in batches.values() for then, *_ in lines):.0f}"
        counts = Counter(sample for lines in kept(batches, victim) for _, _, _, samples in lines for sample in samples)
        twice, never = sum(1 for n in counts.values() if n > 1), SAMPLES - len(counts)
        sizes = sorted({size for lines in batches.values() for _, _, size, _ in lines})
        widths = "-".join(str(BATCH * size) for size in sizes)
        return f"{self.way:10} {end:>22} {pause:>10} {twice:>8} {never:>8}   {widths}"

    def close(self) -> None:
        """End what is left, which this run has started."""
        for pid in filter(is_worker, self.batches()):
            for number in (signal.SIGCONT, signal.SIGKILL):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.output.close()


def is_worker(pid: int) -> bool:
    """Return whether a process is one of this benchmark's workers: a number may be another's by now."""
    try:
        return b"horovod_elastic" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def kept(batches: dict[int, list[tuple[float, int, int, list[int]]]], victim: int) -> list[list]:
    """Return the batches that are in the final weights: what was done again after going back to a commit is dropped."""
    found = []
    for pid, lines in batches.items():
        own: list = []
        for line in lines:
            # The state's step goes back where a commit is restored: what came after it has moved nothing.
            while own and own[-1][1] >= line[1]:
                own.pop()
            own.append(line)
        if pid == victim:  # what it has averaged since the last commit was taken back by the others
            own = [line for line in own if line[1] <= own[-1][1] // COMMIT * COMMIT]
        found.append(own)
    return found


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds that each step sleeps")
    parser.add_argument("--seconds", type=float, default=60, help="that a run may take after that")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker()
        return
    rows = [
        machine.describe(),
        "",
        f"horovodrun --gloo, three workers on one machine, {SAMPLES} samples, batches of {BATCH} a worker,"
        f" a commit every {COMMIT}",
        "",
        f"{'':10} {'end':>22} {'s lost':>10} {'twice':>8} {'never':>8}   global batch",
    ]
    for way in given.ways:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(given, Path(folder) / "run", way)
            try:
                rows.append(run.watch())
            finally:
                run.close()
            print(rows[-1], flush=True)
            if given.output:
                given.output.write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
