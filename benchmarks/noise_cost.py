"""What does `--health.noise-scale` cost in each step?

    horovodrun -np 2 python benchmarks/noise_cost.py

Two trainings of one model, with and without it, take turns of a few steps in the same processes; a turn gives the
median of its steps, and the cost is the ratio of turns that followed each other.
"""

from __future__ import annotations

import argparse
import dataclasses
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

_SETTLING_STEPS = 3  # Horovod notices that the other training's tensors are gone


def main() -> None:
    """Measure, print and write down. Collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--turns", type=int, default=12, help="of each")
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    world = hvdtrain.init()
    recipe = lm()
    model = dataclasses.replace(recipe.model, num_layers=given.layers, hidden_size=given.hidden_size)
    recipe = dataclasses.replace(recipe, model=model)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = world.broadcast_object(Path(folder), "folder")
        trainings = []
        for is_measured in (False, True):
            health = dataclasses.replace(recipe.health, noise_scale=is_measured)
            config = dataclasses.replace(recipe, health=health)
            task = config.build(lambda text: None)
            job = settle(task, config, world, RunDirectory(run_dir), MetricLog(None, []))
            trainings.append((job, start_training(job)))
        turns: tuple[list[float], list[float]] = ([], [])
        for turn in range(given.turns + 1):  # the first is a warm-up
            for (job, training), seconds in zip(trainings, turns, strict=True):
                times = []
                for _ in range(_SETTLING_STEPS + given.steps):
                    started = time.perf_counter()
                    train_step(job, training)
                    times.append(time.perf_counter() - started)
                if turn:
                    seconds.append(statistics.median(times[_SETTLING_STEPS:]))
    without, with_it = turns
    ratios = [b / a for a, b in zip(without, with_it, strict=True)]
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"recipe lm, {task.model.num_parameters():,} parameters, {world.size} ranks,"
            f" {given.turns} turns of {given.steps} steps each",
            f"a step without: {machine.spread([1e3 * s for s in without], 1)} ms",
            f"a step with:    {machine.spread([1e3 * s for s in with_it], 1)} ms",
            f"ratio:          {machine.spread(ratios, 4)}",
        )
    )
    if world.rank == 0:
        print(table)
        if given.output:
            given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
