"""Two CPU ranks on one machine: a step by the size of the buckets in which gradients travel.

    python benchmarks/bucket_size.py --output benchmarks/results/bucket_size.txt

The command `train` on a decoder of 6 layers x 256, launched with each size in turn. A launch gives the median time of a
step, without warm-up; ratios are of launches that followed each other. With one rank nothing travels. "two alone" are
two trainings of one rank each at the same time, which know nothing of each other; the slower one counts: what cores
that share caches and memory leave of the speed of one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

SETTINGS = (
    *("--model.num-layers", "6", "--model.hidden-size", "256", "--data.sequence-length", "128"),
    *("--train.micro-batch-size", "8", "--train.accum-steps", "1", "--log.every", "5"),
    *("--eval.every", "1000000", "--checkpoint.every", "1000000"),
)
SKIPPED = 2  # measurements, for warm-up


def launch(ranks: int, mib: int | None, given: argparse.Namespace) -> float:
    """Return the median seconds of a step."""
    start = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [*start, sys.executable, "-m", "hvdtrain", "train", "lm", "--run-dir", folder, *SETTINGS]
        command += ["--train.steps", str(given.steps), "--train.precision", given.precision]
        command += [*([] if mib is None else ["--comm.bucket-mib", str(mib)]), *given.settings]
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environ, timeout=600, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return statistics.median([line["time/step_s"] for line in lines if "time/step_s" in line][SKIPPED:])


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 1, 4, 8], help="in MiB; ratios are to the first")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("settings", nargs="*", help="more of `train lm`, after --")
    given = parser.parse_args()
    # How many ranks, the size of buckets, and how many launches at the same time.
    runners: dict[str, tuple[int, int | None, int]] = {f"{mib} MiB": (2, mib, 1) for mib in given.sizes}
    runners |= {"two alone": (1, None, 2), "one rank": (1, None, 1)}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for repeat in range(given.repeats):
        for name, (ranks, mib, launches) in runners.items():
            with ThreadPoolExecutor() as pool:
                own = [pool.submit(launch, ranks, mib, given) for _ in range(launches)]
            times[name].append(max(seconds.result() for seconds in own))
            print(f"repeat {repeat + 1}: {name} {1e3 * times[name][-1]:.1f} ms", file=sys.stderr, flush=True)
    first = times[next(iter(runners))]
    rows = [
        f"{name:10} {machine.spread([1e3 * s for s in own], 1):24}"
        f" {machine.spread([a / b for a, b in zip(own, first, strict=True)])}"
        for name, own in times.items()
    ]
    about = f"decoder of 6 layers x 256, 8 x 128 tokens a rank, {given.precision}; {given.repeats} launches; median"
    head = f"{'bucket':10} {'ms a step':24} of the first one's"
    result = "\n".join((machine.describe(), "", f"{about} [quartiles]", "", head, *rows))
    print(result)
    if given.output:
        given.output.write_text(result + "\n")


if __name__ == "__main__":
    main()
