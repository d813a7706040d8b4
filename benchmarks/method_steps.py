"""Steps of every way to average, on the ranks of one launch: what `plan_methods.py` holds `plan` against.

    horovodrun -np 4 python benchmarks/method_steps.py RECIPE.py FILE.json PERIOD --layer-kib 256 ...

Writes the seconds of a step by way, the slowest rank's; of local updates, the mean over a whole period.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

from hvdtrain.recipes import load_recipe
from hvdtrain.recipes.given import apply
from hvdtrain.settings.values import Source, nested
from hvdtrain.trainer import train_step
from hvdtrain.trainer.rehearsal import rehearse
from hvdtrain.trainer.state import start_training
from hvdtrain.verbs.plan.methods import Method, methods_of
from hvdtrain.world import Asking, World, init

STEPS, WARMUP = 7, 2


def main() -> None:
    """Measure and write."""
    recipe_path, output, period, *flags = sys.argv[1:]
    settings = {flags[i].removeprefix("--").replace("-", "_"): float(flags[i + 1]) for i in range(0, len(flags), 2)}
    settings = {name: int(value) if name.endswith("kib") else value for name, value in settings.items()}
    recipe = apply(load_recipe(recipe_path), [(nested(settings), Source("method_steps.py"))])
    world = init()
    seconds(world, recipe, Method())  # the first messages find connections that have to grow
    found = {method.name: seconds(world, recipe, method) for method in methods_of("none", int(period))}
    if world.rank == 0:
        Path(output).write_text(json.dumps(found))
    world.barrier("end")
    world.close()


def seconds(world: World, recipe, method: Method) -> float:
    """Return the seconds of a step."""
    comm = dataclasses.replace(recipe.comm, compression=method.compression)
    if method.period is not None:
        local = {"fragments": method.fragments, "overlap_steps": method.overlap_steps}
        comm = dataclasses.replace(comm, sync="local", period=method.period, outer=method.outer, **local)
    config = dataclasses.replace(recipe, comm=comm)
    job = rehearse(config.build(lambda line: None), config, world, only_full_batches=True)
    training = start_training(job)
    times = []
    asking = Asking(world, training.optimizer)
    warmup = method.period or WARMUP
    for i in range(warmup + (method.period or STEPS)):
        if i == warmup:
            world.barrier(f"begin.{method.name}")
        started = time.perf_counter()
        asking.ask(False)
        train_step(job, training)
        asking.answer()
        times.append(time.perf_counter() - started)
    asking.close()
    kept = times[warmup:]
    own = statistics.mean(kept) if method.period else statistics.median(kept)
    return max(world.all_gather_object(own, f"seconds.{method.name}"))


if __name__ == "__main__":
    main()
