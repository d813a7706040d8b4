"""Real images without a download: scikit-learn's digits as an image folder, learned on 1, 2 and 4 ranks.

    python benchmarks/digit_folders.py --ranks 1 2 4

resnet20 on 1,437 handwritten digits, 360 held out, in the way of the recipe `resnet`. Normalisation is over all ranks
(--model.sync-batch-norm), so that every number of ranks trains the same model; a further run on two ranks is without.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests" / "support")]

import machine  # noqa: E402
from digits import SIZE, write_digit_folders  # noqa: E402

from hvdtrain.rundir.trained import open_trained  # noqa: E402

SETTINGS = [
    *("--model.name", "resnet20", "--data.workers", "0", "--data.augment", "none", "--optim.lr-rule", "none"),
    *("--data.image-size", str(SIZE), "--data.val-resize", str(SIZE), "--optim.schedule", "cosine"),
    *("--train.global-batch-size", "32", "--log.every", "1000"),
]

SYNCHRONISED = ["--model.sync-batch-norm"]  # of one rank it is said to have no effect


def train(folder: Path, ranks: int, *more: str) -> tuple[dict[str, float], float, dict[str, torch.Tensor]]:
    """Train on so many ranks; returns the last evaluation, seconds of training and the weights."""
    run_dir = folder / f"run-{ranks}{''.join(more)}"
    command = [sys.executable, "-m", "hvdtrain", "train", "resnet", "--data.root", str(folder / "digits"), *SETTINGS]
    command += ["--run-dir", str(run_dir), *more]
    if ranks > 1:
        command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *command]
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    started = time.perf_counter()
    done = subprocess.run(command, env=environ, cwd=folder, timeout=1800, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    seconds = time.perf_counter() - started
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "val/top1" in line][-1]
    print(f"{ranks} ranks {' '.join(more)}: {last['val/top1']:.4f} in {seconds:.0f} s", file=sys.stderr, flush=True)
    return last, seconds, open_trained(run_dir, "latest").weights


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return how far two sets of weights are apart, as a share of their size."""
    real = [name for name in one if one[name].is_floating_point()]
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in real)
    return (apart / sum(float(one[name].double().square().sum()) for name in real)) ** 0.5


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--no-own", action="store_true", help="leave out the run whose ranks normalise each its own")
    parser.add_argument("--exact-steps", type=int, default=20, help="steps of a comparison in fp64")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows, exact = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_digit_folders(folder / "digits")
        length = ("--train.epochs", str(given.epochs))
        if not given.no_own:
            metrics, seconds, _ = train(folder, 2, *length)
            figures = f"{metrics['val/top1']:.4f}  {metrics['val/loss']:.5f}  {seconds:9.0f}"
            rows.append(f"    2   each its own     {figures}")
        for ranks in given.ranks:
            metrics, seconds, _ = train(folder, ranks, *length, *SYNCHRONISED[: ranks - 1])
            rows.append(
                f"{ranks:5}   over all ranks   {metrics['val/top1']:.4f}  {metrics['val/loss']:.5f}  {seconds:9.0f}"
            )
        first: dict[str, torch.Tensor] = {}
        for ranks in given.ranks:
            more = ("--train.precision", "fp64", "--train.steps", str(given.exact_steps))
            metrics, _, weights = train(folder, ranks, *more, *SYNCHRONISED[: ranks - 1])
            first = first or weights
            exact.append(f"{ranks:5}   {metrics['val/loss']:.12f}   {difference(first, weights):.1e}")
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"resnet20, 1,437 digits of {SIZE}x{SIZE} pixels, 360 held out, {given.epochs} epochs, batches of 32, fp32",
            "",
            "ranks   normalisation    top-1   loss     s, with start",
            *rows,
            "",
            f"the first {given.exact_steps} steps in fp64, normalised over all ranks",
            "",
            "ranks   held-out loss    weights, relative difference to one rank",
            *exact,
        )
    )
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
