"""Does `plan` hold? Predict 4 and 8 hosts from measurements on 2, and 8 from 4, then measure.

    python benchmarks/plan_accuracy.py --cluster CLUSTER.sh --output benchmarks/results/plan_accuracy.txt

CLUSTER.sh makes hosts of Linux namespaces: `up N --emu`, `net RATE DELAY_MS`, `exec HOST COMMAND...`, `down`. One rank
a host; computing is emulated by sleeps (benchmarks/sleeping_recipe.py). A setting is a network, a model size, a wire
format and a controller.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import machine

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = REPOSITORY / "benchmarks" / "sleeping_recipe.py"
NETWORKS = ("200mbit,1", "100mbit,5", "50mbit,0.5")
LAYERS_KIB = (128, 1024)
WAYS = ("none:mpi", "fp16:gloo")


def on_hosts(given: argparse.Namespace, hosts: int, controller: str, words: list[str]) -> str:
    """Run Python with these words on so many hosts, one rank each, and return its output."""
    where = ",".join(f"node{i + 1}:1" for i in range(hosts))
    launch = ["horovodrun", f"--{controller}", "--disable-cache", "--network-interfaces", "eth0", "-np", str(hosts)]
    if controller == "mpi":
        launch += ["--mpi-args=--mca btl_tcp_flags 1"]
    variables = [
        "env",
        f"PYTHONPATH={REPOSITORY}",
        "OMP_NUM_THREADS=1",
        "HOROVOD_CYCLE_TIME=5",
        "OMPI_ALLOW_RUN_AS_ROOT=1",
    ]
    variables += ["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1", "OMPI_MCA_mpi_yield_when_idle=1"]
    # A waiting host has cores of its own to wait on. Here it must sleep, or MPI's polling takes the cores that the
    # other hosts move data by: 8 hosts were then up to 0.3 s a step slower than with sleeps of 0.2 ms.
    variables.append("OMPI_MCA_threads_pthreads_yield_strategy=nanosleep")
    variables.append("OMPI_MCA_threads_pthreads_nanosleep_time=200000")
    command = [given.cluster, "exec", "node1", *variables, *launch, "-H", where]
    command += [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def measured_step(run_dir: Path) -> float:
    """Return the median seconds of a step, without the first ones."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["time/step_s"] for line in lines if "time/step_s" in line][1:])


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", required=True, help="the script that makes the hosts")
    parser.add_argument(
        "--plan-on", type=int, nargs="+", default=[2, 4], help="hosts that plan measures on, one by one"
    )
    parser.add_argument("--most", type=int, default=8, help="hosts that are predicted last")
    parser.add_argument("--layers-kib", type=int, nargs="+", default=LAYERS_KIB)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="rate and one-way delay in ms")
    parser.add_argument("--ways", nargs="+", default=WAYS, help="wire format and controller")
    parser.add_argument("--work", type=Path, default=Path("plan-accuracy"))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    output, given.output = given.output, None
    rows: list[str] = []
    errors: dict[int, list[float]] = {base: [] for base in given.plan_on}
    subprocess.run([given.cluster, "up", str(given.most), "--emu"], check=True)
    try:
        for network in given.networks:
            rate, delay = network.split(",")
            subprocess.run([given.cluster, "net", rate, delay], check=True)
            for kib in given.layers_kib:
                for way in given.ways:
                    rows += setting(given, rate, delay, kib, way, errors)
    finally:
        subprocess.run([given.cluster, "down"], check=False)
    heads = "   ".join(f"from {base} hosts, error" for base in given.plan_on)
    table = [machine.describe(), "", f" network  delay     model  wire   by  hosts  measured ms   {heads}", *rows, ""]
    for base, of_base in errors.items():
        sizes = [abs(error) for error in of_base]
        table.append(f"from {base} hosts, {len(sizes)} predictions: median error {statistics.median(sizes):.1%}")
        table[-1] += f", largest {max(sizes):.1%}"
    print("\n".join(table))
    if output:
        output.write_text("\n".join(table) + "\n")


def setting(
    given: argparse.Namespace, rate: str, delay: str, kib: int, way: str, errors: dict[int, list[float]]
) -> list[str]:
    """Plan on few hosts, measure on more, and return a row for each number of hosts."""
    wire, controller = way.split(":")
    folder = given.work.resolve() / f"{rate}-{delay}-{kib}-{wire}-{controller}-{os.getpid()}"
    flags = ["--layer-kib", str(kib), "--comm.compression", wire]
    plans, true = {}, {}
    for base in given.plan_on:
        here = folder / f"plan-{base}"
        more = ["--to", str(given.most), "--noise-steps", "0", "--output", str(here)]
        on_hosts(given, base, controller, ["-m", "hvdtrain", "plan", str(RECIPE), *flags, *more])
        plan = json.loads((here / "plan.json").read_text())
        plans[base] = {row["workers"]: row["step"]["total_s"] for row in plan["rows"]}
        # The real steps that it took on all of its ranks.
        true[base] = plan["facts"]["measured_steps_s"][str(base)]
    on_hosts(
        given,
        given.most,
        controller,
        ["-m", "hvdtrain", "train", str(RECIPE), *flags, "--run-dir", str(folder / "run")],
    )
    true[given.most] = measured_step(folder / "run")
    rows = []
    for hosts, seconds in true.items():
        cells = []
        for base, plan in plans.items():
            if hosts <= base:  # it was there, and is no prediction
                cells.append(" " * 18)
                continue
            errors[base].append(plan[hosts] / seconds - 1)
            cells.append(f"{1e3 * plan[hosts]:9.1f} {errors[base][-1]:+8.1%}")
        if any(cell.strip() for cell in cells):
            rows.append(
                f"{rate:>8} {delay:>3} ms {8 * kib / 1024:6.3g} MiB {wire:>5} {controller:>4} {hosts:6}"
                f" {1e3 * seconds:12.1f}   {'    '.join(cells)}"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
