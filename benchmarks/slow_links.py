"""What averages in every step, fewer bits and local updates cost on slow links, and what they reach.

    python benchmarks/slow_links.py --cluster CLUSTER.sh --output benchmarks/results/slow_links.txt

Two questions, apart. Loss: recipe lm on the ranks of this machine, the same steps with each method; the network has no
part in it. Time: a few steps of each method on hosts whose links are throttled, beside DistributedDataParallel on Gloo
with the same model and batch. CLUSTER.sh makes hosts of Linux namespaces: `up N --emu`, `net RATE DELAY_MS`,
`exec HOST COMMAND...`, `down`. Median of the steps' times; of local updates, of whole periods.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
from bare_loops import WINDOW  # noqa: E402

RANK, WARMUP, LENGTH = 8, 20, 128
NETWORKS = ("200mbit,1", "100mbit,5", "20mbit,20")


# DistributedDataParallel's communication hooks, as bare_loops.py knows them.
DDP = {"DDP, Gloo": "", "DDP, Gloo, fp16 hook": "fp16", "DDP, Gloo, PowerSGD hook": "powersgd"}


def methods(given: argparse.Namespace, warmup: int) -> dict[str, list[str]]:
    """Return hvdtrain's flags for each method; `warmup` exact steps come before PowerSGD and top-k."""
    period, rank = given.period, given.rank
    warm = ["--comm.compression-warmup-steps", str(warmup)]
    local = ["--comm.sync", "local", "--comm.period", str(period)]
    also = dict(text.split("=", 1) for text in given.also)
    known = {
        "every step": [],
        "every step, bf16": ["--comm.compression", "bf16"],
        "every step, int8": ["--comm.compression", "int8"],
        f"every step, PowerSGD {rank}": ["--comm.compression", f"powersgd:{rank}", *warm],
        "every step, top 1 %": ["--comm.compression", "topk:0.01", *warm],
        f"local, {period} steps": local,
        f"DiLoCo, {period} steps": [*local, "--comm.outer", "nesterov"],
        f"DiLoCo, {period} steps, bf16": [*local, "--comm.outer", "nesterov", "--comm.compression", "bf16"],
        f"DiLoCo, {period} steps, int8": [*local, "--comm.outer", "nesterov", "--comm.compression", "int8"],
        f"DiLoCo, {period} steps, int8, 4 fragments": [
            *local,
            *("--comm.outer", "nesterov", "--comm.compression", "int8"),
            *("--comm.fragments", "4", "--comm.overlap-steps", str(-(-period // 8))),
        ],
    }
    return {**known, **{name: flags.split() for name, flags in also.items()}}


def period_of(flags: list[str]) -> int:
    """Return the steps between two averages of local updates, 0 where gradients are averaged in each."""
    return int(flags[flags.index("--comm.period") + 1]) if "local" in flags else 0


def shape(given: argparse.Namespace) -> list[str]:
    """Return hvdtrain's flags for the model, the batch and the precision."""
    model = ("--model.num-layers", str(given.layers), "--model.hidden-size", str(given.hidden))
    batch = ("--train.global-batch-size", str(given.batch), "--train.precision", given.precision)
    return [*model, "--model.num-heads", str(given.hidden // 32), *batch]


def run(command: list[str], timeout: int = 1800) -> None:
    """Run a command; its output is shown only where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")


def lines_of(folder: Path) -> list[dict[str, float]]:
    """Return what a run has logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_here(given: argparse.Namespace, flags: list[str], seed: int, folder: Path) -> list[dict[str, float]]:
    """Train on the ranks of this machine; returns what was logged."""
    launch = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(given.hosts), sys.executable]
    train = ["-m", "hvdtrain", "train", "lm", "--run-dir", str(folder), "--train.steps", str(given.steps)]
    run([*launch, *train, "--train.seed", str(seed), *shape(given), *flags])
    return lines_of(folder)


def variables(more: dict[str, str]) -> list[str]:
    """Return the environment of a process on a host, as words before its command."""
    fixed = {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    return ["env", *(f"{name}={value}" for name, value in {**fixed, **more}.items())]


def ours(given: argparse.Namespace, flags: list[str], steps: int, folder: Path) -> float:
    """Return the seconds of a step of hvdtrain on the hosts."""
    where = ",".join(f"node{i + 1}:1" for i in range(given.hosts))
    launch = ["horovodrun", f"--{given.controller}", "--disable-cache", "--network-interfaces", "eth0"]
    launch += [f"--mpi-args={given.mpi_args}"] if given.controller == "mpi" else []
    launch += ["-np", str(given.hosts), "-H", where, sys.executable]
    train = ["-m", "hvdtrain", "train", "lm", "--run-dir", str(folder), "--train.steps", str(steps)]
    train += ["--log.every", str(period_of(flags) or WINDOW), "--eval.every", "none"]
    train += [*shape(given), *flags]
    run([given.cluster, "exec", "node1", *variables({}), *launch, *train])
    times = [line["time/step_s"] for line in lines_of(folder) if "time/step_s" in line]
    return statistics.median(times[1:])


def ddp(given: argparse.Namespace, hook: str, steps: int, folder: Path) -> float:
    """Return the seconds of a step of DistributedDataParallel on the hosts."""
    times = folder / "times.json"
    model = {"layers": given.layers, "hidden_size": given.hidden, "heads": given.hidden // 32}
    description = {**model, "intermediate_size": None, "length": LENGTH, "batch": given.batch // given.hosts}
    description |= {"ranks": given.hosts, "runner": "ddp"}
    description |= {"precision": given.precision, "compile": "none", "hook": hook, "hook_rank": given.rank}
    description |= {"steps": steps, "times": str(times)}
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "bare_loops.py"), json.dumps(description)]
    ranks = []
    for rank in range(given.hosts):
        place = {"RANK": str(rank), "WORLD_SIZE": str(given.hosts), "MASTER_ADDR": "node1", "MASTER_PORT": "29511"}
        place["GLOO_SOCKET_IFNAME"] = "eth0"
        words = [given.cluster, "exec", f"node{rank + 1}", *variables(place), *command]
        ranks.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL))
    try:
        codes = [process.wait(timeout=900) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes):
        raise RuntimeError(f"DistributedDataParallel ended with {codes}")
    return statistics.median(json.loads(times.read_text())[1:])


def losses(given: argparse.Namespace) -> list[str]:
    """Return the rows of the held-out losses."""
    rows = [f"held-out loss in nats a byte after {given.steps} steps on {given.hosts} ranks, seed by seed"]
    known = methods(given, given.warmup)
    chosen = {"every step": [], **{name: flags for name, flags in known.items() if wanted(given, name)}}
    found: dict[str, list[float]] = {name: [] for name in chosen}
    for seed in range(given.seeds):
        for name, flags in chosen.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(train_here(given, flags, seed, Path(folder) / "run")[-1]["val/loss"])
            print(f"seed {seed}: {name} {found[name][-1]:.4f}", file=sys.stderr, flush=True)
    plain = statistics.mean(found["every step"])
    for name, values in found.items():
        of_seeds = " ".join(f"{value:.4f}" for value in values)
        rows.append(f"{name:38} {of_seeds}   mean {statistics.mean(values) / plain - 1:+.2%} of every step's")
    return rows


class Times:
    """The rows of the times on each network, as far as they have been measured."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        known = methods(given, 0)  # nothing is timed while it warms up
        self.flags = {name: flags for name, flags in known.items() if wanted(given, name)}
        self.names = [name for name in DDP if wanted(given, name)] + [*self.flags]
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self.deadline = time.monotonic() + 60 * given.minutes
        self.failed: list[str] = []

    def measure(self, note: Callable[[], None]) -> None:
        """Measure all methods, network by network; `note` is called after each one."""
        given = self.given
        for network in given.networks:
            run([given.cluster, "net", *network.split(",")])
            found = self.seconds[network] = {name: [] for name in self.names}
            for _ in range(given.repeats):
                for name, values in found.items():
                    if time.monotonic() > self.deadline:
                        return
                    try:
                        values.append(self.one(name))
                        said = f"{1e3 * values[-1]:.0f} ms"
                    except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # others can be measured
                        said = f"failed: {str(error)[-400:]}"
                        self.failed.append(f"{network} {name}: failed")
                    print(f"{network} {name}: {said}", file=sys.stderr, flush=True)
                    note()

    def one(self, name: str) -> float:
        """Return the seconds of a step."""
        given = self.given
        with tempfile.TemporaryDirectory() as folder:
            if name in DDP:
                return ddp(given, DDP[name], given.windows * WINDOW, Path(folder))
            flags = self.flags[name]
            period = period_of(flags) or WINDOW
            steps = period * max(3, -(-given.windows * WINDOW // period))
            return ours(given, flags, steps, Path(folder) / "run")

    def rows(self) -> list[str]:
        """Return the lines of the table; what was not measured has none."""
        rows, tokens = [], self.given.batch * LENGTH
        for network, found in self.seconds.items():
            rate, delay = network.split(",")
            what = "ms a step, tokens/s, DDP's time / this one's"
            rows += ["", f"{rate}, {delay} ms one way, {self.given.hosts} hosts: {what}"]
            for name, values in ((name, values) for name, values in found.items() if values):
                middle = statistics.median(values)
                pairs = zip(found.get("DDP, Gloo", ()), values, strict=False)
                ratios = [plain / own for plain, own in pairs]
                ratio = machine.spread(ratios, 2) if ratios else ""
                rows.append(f"{name:38} {1e3 * middle:8.1f} {tokens / middle:10,.0f}   {ratio}")
        return [*rows, *self.failed]


def wanted(given: argparse.Namespace, name: str) -> bool:
    """Return whether a method is to be measured."""
    return not given.only or any(fnmatchcase(name, pattern) for pattern in given.only)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of what says what is trained, how, and on which links."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", help="the script that makes the hosts; without it, losses alone")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--controller", choices=("mpi", "gloo"), default="mpi", help="of hvdtrain's ranks on the hosts")
    parser.add_argument("--mpi-args", default="--mca btl_tcp_flags 1", help="as horovodrun takes them")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=128, help="size; a head for each 32")
    parser.add_argument("--batch", type=int, default=16, help="samples of all hosts in a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of ours, and of DDP's autocast")
    parser.add_argument("--period", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=WARMUP, help="exact steps before PowerSGD and top-k begin")
    parser.add_argument("--rank", type=int, default=RANK, help="of PowerSGD")
    parser.add_argument("--steps", type=int, default=300, help="of the trainings whose loss is compared")
    parser.add_argument("--seeds", type=int, default=3, help="0: times alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4, help=f"of {WINDOW} steps, of methods that average in each")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="rate and one-way delay in ms")
    parser.add_argument("--only", nargs="+", help="methods whose names fit one of these patterns")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=FLAGS", help="more methods, or others of a name")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after so many, no more times are measured")
    parser.add_argument("--output", type=Path)
    return parser


def head(given: argparse.Namespace) -> list[str]:
    """Return the lines above a table."""
    return [
        machine.describe(),
        "",
        f"recipe lm: {given.layers} layers x {given.hidden}, a global batch of {given.batch} x {LENGTH} bytes,"
        f" one thread a rank, {given.precision}",
        "",
    ]


def timed(given: argparse.Namespace, table: list[str]) -> Times:
    """Measure the times on the hosts, writing down what there is so far behind a table."""
    given.cluster = str(Path(given.cluster).resolve())
    times = Times(given)
    run([given.cluster, "up", str(given.hosts), "--emu"])
    try:
        times.measure(lambda: write(given, [*table, *times.rows()]))
    finally:
        subprocess.run([given.cluster, "down"], check=False, capture_output=True)
    return times


def main() -> None:
    """Measure, print and write down."""
    given = make_parser(__doc__).parse_args()
    table = head(given)
    if given.seeds:
        table += losses(given)
    if given.cluster:
        table += timed(given, table).rows()
    print("\n".join(table))
    write(given, table)


def write(given: argparse.Namespace, table: list[str]) -> None:
    """Write what there is so far."""
    if given.output:
        given.output.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
