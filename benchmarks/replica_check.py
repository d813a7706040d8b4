"""What does the check that all ranks hold the same weights cost, at its default of once in 100 steps?

    horovodrun -np 2 python benchmarks/replica_check.py

Steps of the default recipe and checks take turns; the share is a check's median over that of 100 steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from hvdtrain.process.launch import prepare_process  # noqa: E402

launch = prepare_process()  # threads, before torch starts

import machine  # noqa: E402

import hvdtrain  # noqa: E402
from hvdtrain.recipes.lm import lm  # noqa: E402
from hvdtrain.rundir.directory import RunDirectory  # noqa: E402
from hvdtrain.rundir.log import MetricLog  # noqa: E402
from hvdtrain.trainer import settle, train_step  # noqa: E402
from hvdtrain.trainer.state import start_training  # noqa: E402
from hvdtrain.trainer.strategy import model_tensors  # noqa: E402


def main() -> None:
    """Measure, print and write down. Collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    world = hvdtrain.init()
    recipe = lm()
    task = recipe.build(lambda text: None)
    steps, checks = [], []
    with tempfile.TemporaryDirectory() as folder:
        job = settle(
            task, recipe, world, RunDirectory(world.broadcast_object(Path(folder), "folder")), MetricLog(None, [])
        )
        training = start_training(job)
        for repeat in range(given.repeats + 1):  # the first is a warm-up
            for _ in range(5):
                started = time.perf_counter()
                train_step(job, training)
                steps.append(time.perf_counter() - started)
            started = time.perf_counter()
            world.check_replicas(model_tensors(training.model), "benchmark")
            checks.append(time.perf_counter() - started)
            if repeat == 0:
                steps.clear()
                checks.clear()
    every = recipe.health.replica_check_every
    assert every is not None
    share = statistics.median(checks) / (every * statistics.median(steps))
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"recipe lm, {task.model.num_parameters():,} parameters, {world.size} ranks",
            f"a step:  {machine.spread([1e3 * s for s in steps], 1)} ms",
            f"a check: {machine.spread([1e3 * s for s in checks], 1)} ms",
            f"once in {every} steps: {share:.3%} of the training time",
        )
    )
    if world.rank == 0:
        print(table)
        if given.output:
            given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
