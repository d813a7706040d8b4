"""Are planted faults named for what they are, and do healthy runs raise no alarm?

    python benchmarks/planted_faults.py --output benchmarks/results/planted_faults.txt

Real runs on 2 to 4 ranks of this machine: healthy ones, of four recipes and several seeds; a rank that sleeps in its
loss, one whose data come late, a step whose samples are far from all others; and two hosts of Linux namespaces (which
take root), whose link loses its bandwidth while they train. Every WARNING of a run is an alarm.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests" / "support")]

import hosts  # noqa: E402
import machine  # noqa: E402

Action = Callable[[], object]

RECIPE = '''
import os
import time
from dataclasses import dataclass

import torch

import hvdtrain
from hvdtrain.process.launch import detect_launch

RANK, FAULT, SECONDS = detect_launch().rank, os.environ.get("FAULT", ""), 0.02
WIDTH = int(os.environ.get("WIDTH", "64"))


class Samples(hvdtrain.TensorSamples):
    def batch(self, indices):
        time.sleep(0.06 if FAULT == "data" and RANK == 1 else 0.0)
        return super().batch(indices)


def loss(model, batch):
    time.sleep(0.08 if FAULT == "rank" and RANK == 2 else SECONDS)
    return {"loss": (model(batch[0]) - batch[1]).square().sum()}


@dataclass(frozen=True, kw_only=True)
class Paced(hvdtrain.Recipe):
    """A network of two layers that learns the sum of its input; a step takes about as long as it sleeps."""

    def build(self, say):
        torch.manual_seed(0)
        x = torch.randn(20_000, WIDTH)
        y = x.sum(1, keepdim=True) + torch.randn(len(x), 1)
        if FAULT == "spike":  # a few samples, met once an epoch
            y[7000:7004] *= 1e4
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
FAULTS = {
    "rank": (4, r"rank 2 on \S+ is slow, .* sleeps for the rest"),
    "data": (4, r"rank 1 on \S+ is slow, .* it waits for data"),
    "spike": (2, r"step \d+: a spike: the gradient norm is"),
}
LINK = r"the network between the hosts has become slower"
# Gradients of 4 MB a step, which a link of 100 Mbit/s carries in a third of a second.
WIDE, THROTTLE = (
    "1000",
    "PATH=$PATH:/usr/sbin:/sbin tc qdisc add dev eth0 root tbf rate 100mbit burst 64kb latency 200ms",
)


def main() -> None:
    """Run all, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=int, default=20, help="runs")
    parser.add_argument("--seconds", type=int, default=25, help="of a run")
    parser.add_argument("--faults", nargs="*", choices=[*FAULTS, "link"], default=[*FAULTS, "link"])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    lines = [machine.describe(), "", f"healthy runs of {given.seconds} s each on 2 ranks, and their alarms"]

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "paced.py").write_text(RECIPE)
        num_alarms = 0
        for number in range(given.healthy):
            name = [*HEALTHY][number % len(HEALTHY)]
            asked = [*HEALTHY[name], "--train.seed", str(number)]
            said, steps = trained(folder, f"healthy-{number}", asked, 2, given.seconds)
            alarms = alarms_of(said)
            num_alarms += len(alarms)
            tell(f"  {name}, seed {number}: {steps} steps, {len(alarms)} alarms{''.join(f'; {one}' for one in alarms)}")
        tell(f"{given.healthy} healthy runs, {num_alarms} alarms")
        tell("")
        for fault, (ranks, expected) in FAULTS.items():
            if fault not in given.faults:
                continue
            said, steps = trained(folder, fault, ["paced.py"], ranks, given.seconds, FAULT=fault)
            tell_fault(tell, fault, said, steps, expected)
        if "link" in given.faults:
            tell_fault(tell, "link", *throttled(folder, given.seconds), LINK)
    if given.output:
        given.output.write_text("\n".join(lines) + "\n")


def tell_fault(tell: Callable[[str], None], fault: str, said: str, steps: int, expected: str) -> None:
    """Tell whether a planted fault was named, and once."""
    alarms = alarms_of(said)
    right = [alarm for alarm in alarms if re.search(expected, alarm)]
    tell(f"planted: {fault}: {steps} steps, named {len(right)} times, {len(alarms) - len(right)} other alarms")
    for alarm in alarms:
        tell(f"  {alarm}")
    if not alarms:
        tell(f"  {said[-500:]}" if steps == 0 else "  nothing was said")


def alarms_of(said: str) -> list[str]:
    """Return the warnings of a run about its health; that it was stopped in time is none."""
    return [line.partition("WARNING: ")[2] for line in said.splitlines() if "WARNING: step" in line]


def command(run_dir: str, asked: Sequence[str]) -> list[str]:
    """Return the words after the launcher."""
    return [sys.executable, "-m", "hvdtrain", "train", *asked, "--run-dir", run_dir, "--log.every", "10"]


def steps_of(folder: str, run_dir: str) -> int:
    """Return how far a run has come, by its metrics."""
    try:
        return int(re.findall(r'"step": (\d+)', (Path(folder) / run_dir / "metrics.jsonl").read_text())[-1])
    except (OSError, IndexError):
        return 0


def watched(process: subprocess.Popen[str], folder: str, run_dir: str, moments: Sequence[tuple[float, Action]]) -> str:
    """Do things to a run at some seconds after its first line of metrics; returns what it has said.

    The first line, not the start: on a busy machine a start takes long.
    """
    deadline = time.monotonic() + 600
    while not steps_of(folder, run_dir) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    began = time.monotonic()
    for seconds, act in moments:
        while time.monotonic() - began < seconds and process.poll() is None:
            time.sleep(0.2)
        if process.poll() is None:
            act()
    return process.communicate(timeout=300)[0]


def started(words: Sequence[str], folder: str, **variables: str) -> subprocess.Popen[str]:
    """Start a launcher in a folder."""
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(words, cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def trained(
    folder: str, run_dir: str, asked: Sequence[str], ranks: int, seconds: float, **variables: str
) -> tuple[str, int]:
    """Train on ranks of this machine; returns what was said, and the steps."""
    launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    process = started([*launcher, *command(run_dir, asked)], folder, **variables)
    said = watched(process, folder, run_dir, [(seconds, process.terminate)])
    return said, steps_of(folder, run_dir)


def throttled(folder: str, seconds: float) -> tuple[str, int]:
    """Train on two hosts whose link loses its bandwidth in the middle; returns what was said, and the steps."""
    if reason := hosts.why_not():
        return f"not run: {reason}", 0
    variables = {name: value for name, value in os.environ.items() if name.startswith("OMPI_ALLOW_RUN_AS_ROOT")}
    variables |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WIDTH": WIDE}
    with hosts.Hosts(2, path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin") as cluster:

        def throttle() -> None:
            for name in cluster.names:
                done = cluster.do(name, ["sh", "-c", THROTTLE])
                assert done.returncode == 0, done.stderr

        # It ends by itself: no signal reaches a launcher in other namespaces.
        asked = ["paced.py", "--train.max-time", f"{6 * seconds:.0f}s"]
        launcher = ["horovodrun", "--gloo", "-np", "2", "-H", "node1:1,node2:1"]
        words = cluster.command("node1", [*launcher, *command(str(Path(folder) / "link"), asked)], **variables)
        words = [f"--wd={folder}" if str(word).startswith("--wd=") else str(word) for word in words]
        process = started(words, folder)
        said = watched(process, folder, "link", [(1.5 * seconds, throttle)])
    return said, steps_of(folder, "link")


if __name__ == "__main__":
    main()
