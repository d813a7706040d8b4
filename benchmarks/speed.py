"""hvdtrain against a bare Horovod loop, PyTorch DDP and one process: same model, data, precision, threads, clipping.

    python benchmarks/speed.py --ranks 2 --steps 60 --repeats 5
    python benchmarks/speed.py --ranks 1 --nanogpt DIR --runners hvdtrain nanogpt

With a clone of github.com/karpathy/nanoGPT, its model of the same layers, width and length is trained by the loop of
its train.py: random windows, the next batch read between forward and backward, AdamW of its own choosing. The inner
width of our feed-forward layers then makes both models equally large.

Each runner is launched in turn, `--repeats` times; a launch gives the median time of a step, without warm-up.
Ratios are of launches that followed each other. hvdtrain is the command that users type; the others are the shortest
correct loops, in bare_loops.py. On a machine with GPUs each rank takes one. On CPUs where hvdtrain has linear layers
compute by oneDNN (hvdtrain/models/linear.py), "torch's mm" is hvdtrain without that: the same products as the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
from bare_loops import WINDOW  # noqa: E402

TORCHS_PRODUCTS = "torch's mm"  # hvdtrain with --model.linear torch: the loop alone, compared with the others
RUNNERS = ("hvdtrain", TORCHS_PRODUCTS, "horovod", "ddp", "one process", "nanogpt")
SKIPPED_WINDOWS = 2  # warm-up


def settings(given: argparse.Namespace) -> list[str]:
    """Return hvdtrain's flags for the model and batch of the comparison."""
    return [
        *("--model.num-layers", str(given.layers), "--model.hidden-size", str(given.hidden_size)),
        *("--model.num-heads", str(given.heads), "--model.compile", "model" if given.compile else "none"),
        *("--data.sequence-length", str(given.length), "--train.steps", str(given.steps)),
        *("--train.micro-batch-size", str(given.batch), "--train.accum-steps", "1", "--optim.warmup-steps", "0"),
        *("--log.every", str(WINDOW), "--eval.every", "1000000", "--checkpoint.every", "1000000"),
        *("--train.precision", given.precision),
        *(("--model.intermediate-size", str(given.intermediate_size)) if given.intermediate_size else ()),
    ]


def launcher(runner: str, given: argparse.Namespace) -> list[str]:
    """Return the command that starts this runner's ranks."""
    ranks = str(given.ranks)
    if runner == "one process" or given.ranks == 1:
        return [sys.executable]
    if runner in ("ddp", "nanogpt"):
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    if given.controller == "gloo":
        return ["horovodrun", "--gloo", "-np", ranks, sys.executable]
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", ranks, sys.executable]


def launch(runner: str, given: argparse.Namespace) -> float:
    """Return the median seconds of a step in one launch of a runner."""
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(given.threads)}
        if runner in RUNNERS[:2]:
            command = [*launcher(runner, given), "-m", "hvdtrain", "train", "lm", "--run-dir", folder, *settings(given)]
            command += ["--model.linear", "torch"] if runner == TORCHS_PRODUCTS else []
        else:
            description = {name: value for name, value in vars(given).items() if not isinstance(value, Path)}
            description |= {"runner": runner, "times": str(times), "nanogpt": str(given.nanogpt)}
            loops = str(Path(__file__).with_name("bare_loops.py"))
            command = [*launcher(runner, given), loops, json.dumps(description)]
        if runner not in ("ddp", "nanogpt") and environ.get("OMPI_MCA_mpi_yield_when_idle") is None:
            environ["OMPI_MCA_mpi_yield_when_idle"] = "1"  # as hvdtrain sets it: fair to the bare loop
        done = subprocess.run(command, env=environ, cwd=REPOSITORY, timeout=1800, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{runner} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        if runner in RUNNERS[:2]:
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line)["time/step_s"] for line in lines if "time/step_s" in line]
        else:
            steps = json.loads(times.read_text())
    return statistics.median(steps[SKIPPED_WINDOWS:])


def as_large_as_nanogpt(given: argparse.Namespace) -> int:
    """Return the multiple of 16 with which the decoder has about, and not more than, the parameters of nanoGPT's model.

    Its feed-forward layers have 8 C^2 parameters, ours 3 C I; it has T C more, for positions.
    """
    exact = 8 * given.hidden_size / 3 + given.length / (3 * given.layers)
    return int(exact) // 16 * 16


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, help="default: the recipe's, or what makes nanoGPT as large")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="samples of a rank")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="the whole model, by torch.compile")
    parser.add_argument("--controller", choices=["mpi", "gloo"], default="mpi")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runners", nargs="+", default=None, choices=RUNNERS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT, for the runner of that name")
    given = parser.parse_args()
    runners = given.runners or [runner for runner in RUNNERS if runner != "nanogpt" or given.nanogpt]
    if "nanogpt" in runners and given.nanogpt is None:
        parser.error("the runner nanogpt needs --nanogpt DIR, a clone of github.com/karpathy/nanoGPT")
    if given.nanogpt:
        given.nanogpt = given.nanogpt.resolve()
        given.intermediate_size = given.intermediate_size or as_large_as_nanogpt(given)
    seconds: dict[str, list[float]] = {runner: [] for runner in runners}
    for repeat in range(given.repeats):
        for runner in runners:
            seconds[runner].append(launch(runner, given))
            print(f"repeat {repeat + 1}: {runner} {1e3 * seconds[runner][-1]:.1f} ms", file=sys.stderr, flush=True)
    ours = seconds[runners[0]]
    rows = [
        f"{runner:12} {machine.spread([1e3 * s for s in times], 1):26}"
        f" {machine.spread([a / b for a, b in zip(ours, times, strict=True)])}"
        for runner, times in seconds.items()
    ]
    inner = f" (inner width {given.intermediate_size})" if given.intermediate_size else ""
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"decoder of {given.layers} layers x {given.hidden_size}{inner},"
            f" {given.batch} x {given.length} tokens a rank, {given.ranks} ranks of {given.threads} thread,"
            f" {given.precision}{', compiled' if given.compile else ''}, {given.controller};"
            f" {given.repeats} interleaved launches of {given.steps} steps; median [quartiles]",
            "",
            "runner       ms a step                  hvdtrain's time / this one's",
            *rows,
        )
    )
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
