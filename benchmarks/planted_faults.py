"""Are planted faults named for what they are, and do healthy runs raise no alarm?

    python benchmarks/planted_faults.py --output benchmarks/results/planted_faults.txt

Real runs on 2 to 4 ranks of this machine: healthy ones, of four recipes and several seeds, most alone and the others
two at a time, which fill the cores twice over; a rank that sleeps in its loss, one whose data come late, a step whose
samples are far from all others; and two hosts of Linux namespaces (which take root), whose link loses its bandwidth
while they train. Every WARNING of a step is an alarm. It takes about ten minutes on two cores; what is known so far is
in the file at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests" / "support")]

import hosts  # noqa: E402
import machine  # noqa: E402

Tell = Callable[[str], None]

RECIPE = '''
import os
import time
from dataclasses import dataclass

import torch

import hvdtrain
from hvdtrain.process.launch import detect_launch

RANK, FAULT = detect_launch().rank, os.environ.get("FAULT", "")
WIDTH = int(os.environ.get("WIDTH", "64"))
SECONDS, LONGER = 0.02, 0.15


class Samples(hvdtrain.TensorSamples):
    num_read = 0

    def batch(self, indices):
        time.sleep(LONGER if FAULT == "data" and RANK == 1 else 0.0)
        x, y = super().batch(indices)
        Samples.num_read += 1
        return x, y * (1e4 if FAULT == "spike" and Samples.num_read == SPIKE_AT else 1.0)


SPIKE_AT = 150


def loss(model, batch):
    time.sleep(LONGER if FAULT == "rank" and RANK == 2 else SECONDS)
    return {"loss": (model(batch[0]) - batch[1]).square().sum()}


@dataclass(frozen=True, kw_only=True)
class Paced(hvdtrain.Recipe):
    """A network of two layers that learns the sum of its input; a step takes about as long as it sleeps."""

    def build(self, say):
        torch.manual_seed(0)
        x = torch.randn(20_000, WIDTH)
        y = x.sum(1, keepdim=True) + torch.randn(len(x), 1)
        data, held_out = Samples(x, y), hvdtrain.TensorSamples(x[:64], y[:64])
        model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, 1))
        return hvdtrain.Task(model=model, train_data=data, val_data=held_out, loss_sums=loss)


def recipe():
    return Paced(train=hvdtrain.TrainConfig(steps=100_000, global_batch_size=16), log=hvdtrain.LogConfig(every=10))
'''
SMALL_LM = ["lm", "--model.num-layers", "2", "--model.hidden-size", "64", "--data.sequence-length", "64"]
HEALTHY: dict[str, list[str]] = {
    "a small decoder": [*SMALL_LM, "--train.steps", "100000", "--optim.warmup-steps", "50"],
    "the same, AdamW at ten times the rate": [*SMALL_LM, "--train.steps", "100000", "--optim.peak-lr", "0.01"],
    "a small decoder, samples in bf16": [*SMALL_LM, "--train.steps", "100000", "--train.precision", "bf16"],
    "a regression": ["paced.py"],
}
# Of ten healthy runs so many are alone; the others share the cores, two at a time, and are watched for longer.
ALONE_OF_TEN, LONGER = 6, 1.7
# Fault -> ranks, what must be said, and how long it may take.
FAULTS = {
    "slow rank": ("rank", 4, r"rank 2 on \S+ is slow, .* sleeps for the rest", 60),
    "slow data": ("data", 4, r"rank 1 on \S+ is slow, .* it waits for data", 60),
    "spike": ("spike", 2, r"step 1[45]\d: a spike: ", 60),
}
LINK, LINK_SAID, LINK_S = "throttled link", r"the network between the hosts has become slower", 90
# Seconds that a run goes on after its fault was named: whatever else it says is an alarm that is wrong.
AFTERWARDS_S = 5.0
# Gradients of 4 MB a step, which a link of 100 Mbit/s carries in a third of a second; so long it is a whole one.
WIDE, UNTIL_THROTTLED_S = "1000", 22.0
THROTTLE = "PATH=$PATH:/usr/sbin:/sbin tc qdisc add dev eth0 root tbf rate 100mbit burst 64kb latency 200ms"
START_S = 300.0


def main() -> None:
    """Run all, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=int, default=20, help="runs")
    parser.add_argument("--seconds", type=float, default=18, help="of a healthy run that is alone")
    parser.add_argument("--faults", nargs="*", choices=[*FAULTS, LINK], default=[*FAULTS, LINK])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    lines = [machine.describe(), ""]

    def write(last: str = "... not finished: what is known so far") -> None:
        if given.output:
            given.output.write_text("\n".join([*lines, *([last] if last else [])]) + "\n")

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        write()

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "paced.py").write_text(RECIPE)
        if given.healthy:
            healthy_runs(tell, Path(folder), given.healthy, given.seconds)
        planted(tell, Path(folder), given.faults)
    tell(f"in all {(time.monotonic() - began) / 60:.1f} minutes")
    write("")


def healthy_runs(tell: Tell, folder: Path, number: int, seconds: float) -> None:
    """Train what is healthy, and tell of each run how many alarms it has raised."""
    num_alone = number * ALONE_OF_TEN // 10
    longer = LONGER * seconds
    tell(
        f"healthy runs on 2 ranks, {num_alone} alone for {seconds:g} s, {number - num_alone} in pairs for {longer:g} s"
    )
    groups = [[i] for i in range(num_alone)]
    groups += [[*range(i, min(i + 2, number))] for i in range(num_alone, number, 2)]
    num_alarms = 0
    for group in groups:
        with contextlib.ExitStack() as stack:
            runs = []
            for i in group:
                asked = [*HEALTHY[[*HEALTHY][i % len(HEALTHY)]], "--train.seed", str(i)]
                runs.append(stack.enter_context(started(folder, f"healthy-{i}", launched(asked, f"healthy-{i}", 2))))
            for run in runs:
                run.wait_for_training()
            time.sleep(seconds if len(group) == 1 else longer)
        for i, run in zip(group, runs, strict=True):
            alarms = run.alarms()
            num_alarms += len(alarms)
            what = f"{[*HEALTHY][i % len(HEALTHY)]}, seed {i}{', beside another' if len(group) > 1 else ''}"
            tell(f"  {what}: {run.steps()} steps, {len(alarms)} alarms{''.join(f'; {one}' for one in alarms)}")
            if not run.steps():
                tell(f"    it did not train: {run.said()[-300:]!r}")
    tell(f"{number} healthy runs, {num_alarms} alarms")
    tell("")


def planted(tell: Tell, folder: Path, faults: Sequence[str]) -> None:
    """Train with each of the faults, and tell whether it was named for what it is."""
    rows = [("fault", "named", "after", "at step", "other alarms")]
    for name in faults:
        tell(f"planted: {name}")
        fault, ranks, expected, seconds = FAULTS.get(name, ("", 0, LINK_SAID, LINK_S))
        if name == LINK:
            run, after = throttled(folder)
        else:
            with started(folder, fault, launched(["paced.py"], fault, ranks), FAULT=fault) as run:
                run.wait_for_training()
                after = run.wait_for(expected, seconds)
        alarms = run.alarms()
        right = [alarm for alarm in alarms if re.search(expected, alarm)]
        for alarm in alarms or [f"nothing was said; the run ended with {run.said()[-300:]!r}"]:
            tell(f"  {alarm}")
        step = re.search(r"step ([\d,]+)", right[0]) if right else None
        named = f"{len(right)} time{'s' * (len(right) != 1)}" if right else "NOT NAMED"
        seconds_later = f"{after:.0f} s" if after is not None else "-"
        rows.append((name, named, seconds_later, step[1] if step else "-", str(len(alarms) - len(right))))
    tell("")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        tell("  ".join(map(str.ljust, row, widths)).rstrip())


@dataclass
class Run:
    """A run that was started."""

    process: subprocess.Popen[bytes]
    folder: Path
    name: str

    def said(self) -> str:
        """Return what it has said so far."""
        return (self.folder / f"{self.name}.txt").read_text(errors="replace")

    def alarms(self) -> list[str]:
        """Return its warnings about its health; that it was stopped in time is none."""
        lines = self.said().replace(socket.gethostname(), "HOST").splitlines()
        return [line.partition("WARNING: ")[2] for line in lines if "WARNING: step" in line]

    def steps(self) -> int:
        """Return how far it has come, by its metrics."""
        try:
            return int(re.findall(r'"step": (\d+)', (self.folder / self.name / "metrics.jsonl").read_text())[-1])
        except (OSError, IndexError):
            return 0

    def wait_for_training(self) -> None:
        """Wait for its first line of metrics: on a busy machine a start takes long."""
        deadline = time.monotonic() + START_S
        while not self.steps() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)

    def wait_for(self, expected: str, seconds: float) -> float | None:
        """Wait until it has named its fault, and a little longer; returns after how many seconds, None: not at all."""
        began = time.monotonic()
        while time.monotonic() - began < seconds and self.process.poll() is None:
            if any(re.search(expected, alarm) for alarm in self.alarms()):
                after = time.monotonic() - began
                time.sleep(AFTERWARDS_S)
                return after
            time.sleep(0.2)
        return None


@contextlib.contextmanager
def started(folder: Path, name: str, words: Sequence[str], **variables: str) -> Iterator[Run]:
    """Start a launcher in a folder; in the end it is asked to stop, and waited for."""
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | variables
    with (folder / f"{name}.txt").open("wb") as output:
        process = subprocess.Popen(words, cwd=folder, env=environ, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield Run(process, folder, name)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def trained(asked: Sequence[str], run_dir: str) -> list[str]:
    """Return the words after the launcher."""
    return [sys.executable, "-m", "hvdtrain", "train", *asked, "--run-dir", run_dir, "--log.every", "10"]


def launched(asked: Sequence[str], run_dir: str, ranks: int) -> list[str]:
    """Return the words that train on ranks of this machine."""
    launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    return [*launcher, *trained(asked, run_dir)]


def throttled(folder: Path) -> tuple[Run, float | None]:
    """Train on two hosts whose link loses its bandwidth; returns the run, and how long that took to be named."""
    name = "link"
    if reason := hosts.why_not():
        (folder / f"{name}.txt").write_text(f"not run: {reason}")
        return Run(subprocess.Popen(["true"]), folder, name), None
    variables = {name: value for name, value in os.environ.items() if name.startswith("OMPI_ALLOW_RUN_AS_ROOT")}
    variables |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WIDTH": WIDE}
    with hosts.Hosts(2, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin") as cluster:
        # It ends with its hosts; no signal reaches a launcher in other namespaces.
        asked = ["paced.py", "--train.max-time", f"{START_S + LINK_S:.0f}s"]
        launcher = ["horovodrun", "--gloo", "-np", "2", "-H", "node1:1,node2:1"]
        words = cluster.command("node1", [*launcher, *trained(asked, str(folder / name))], **variables)
        words = [f"--wd={folder}" if str(word).startswith("--wd=") else str(word) for word in words]
        with started(folder, name, words) as run, contextlib.ExitStack() as at_the_end:
            run.wait_for_training()
            time.sleep(UNTIL_THROTTLED_S)
            for host in cluster.names:
                done = cluster.do(host, ["sh", "-c", THROTTLE])
                assert done.returncode == 0, done.stderr
            after = run.wait_for(LINK_SAID, LINK_S)
            for host in [*cluster.holders]:
                if host in cluster.names:
                    at_the_end.callback(cluster.kill, host)
    return run, after


if __name__ == "__main__":
    main()
