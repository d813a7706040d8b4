"""What does everything that a run notes of itself cost in each step?

    horovodrun -np 2 python benchmarks/metrics_cost.py --output benchmarks/results/metrics_cost.txt

Two trainings of one model take turns of some steps in the same processes, each turn with a line of metrics. One has all
that is noted of a step: where its time goes, own times of the ranks, memory, bytes on the wire, spikes, slow ranks, a
slow network. The other one has the loss, the learning rate, the gradient norm and the time of a step alone, as a plain
loop logs them. A turn gives the mean of its steps, its line of metrics included; the cost is the ratio of turns that
followed each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from hvdtrain.process.launch import prepare_process  # noqa: E402

launch = prepare_process()  # threads, before torch starts

import machine  # noqa: E402

import hvdtrain  # noqa: E402
from hvdtrain.process.progress import Phase, Progress  # noqa: E402
from hvdtrain.recipes.lm import lm  # noqa: E402
from hvdtrain.rundir.directory import RunDirectory  # noqa: E402
from hvdtrain.rundir.log import MetricLog  # noqa: E402
from hvdtrain.rundir.sinks import JsonLines  # noqa: E402
from hvdtrain.trainer import Job, settle, train_step  # noqa: E402
from hvdtrain.trainer.device_clock import progress_of  # noqa: E402
from hvdtrain.trainer.line import step_metrics  # noqa: E402
from hvdtrain.trainer.slow_network import SlowNetwork  # noqa: E402
from hvdtrain.trainer.slow_ranks import SlowRanks  # noqa: E402
from hvdtrain.trainer.spikes import Spikes  # noqa: E402
from hvdtrain.trainer.state import Training, start_training  # noqa: E402
from hvdtrain.trainer.stopwatch import Stopwatch, counts_of  # noqa: E402
from hvdtrain.trainer.wire import Traffic  # noqa: E402

_SETTLING_STEPS = 3  # Horovod notices that the other training's tensors are gone
_HEALTH = (Spikes, SlowRanks, SlowNetwork, Traffic)


class NoProgress(Progress):
    """Notes nothing of where a rank is."""

    def _move(self, step: int | None, phase: Phase) -> None:
        pass


class Plain:
    """Lines of metrics as a plain loop writes them."""

    def __init__(self, job: Job, training: Training) -> None:
        self._job, self._training = job, training
        self._since, self._step = time.perf_counter(), training.step

    def metrics(self) -> dict[str, float]:
        """Return loss, learning rate, gradient norm and the time of a step. Collective."""
        job, training = self._job, self._training
        window = next(one for one in training.components if one.name == "window")
        metrics = window.metrics(training)
        now, steps = time.perf_counter(), training.step - self._step
        metrics["time/step_s"] = (now - self._since) / steps
        self._since, self._step = now, training.step
        metrics[f"throughput/{job.task.unit}_per_s"] = job.plan.global_batch_size / metrics["time/step_s"]
        return metrics


def main() -> None:
    """Measure, print and write down. Collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--turns", type=int, default=30, help="of each")
    parser.add_argument("--steps", type=int, default=20, help="of a turn, with a line of metrics at its end")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    world = hvdtrain.init()
    recipe = lm()
    model = dataclasses.replace(recipe.model, num_layers=given.layers, hidden_size=given.hidden_size)
    recipe = dataclasses.replace(recipe, model=model)
    turns: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(world.broadcast_object(folder, "folder"))
        sides = [side(world, recipe, run_dir / name, name == "all") for name in ("plain", "all")]
        for turn in range(given.turns + 1):  # the first is a warm-up
            for take_turn, seconds in zip(sides, turns, strict=True):
                taken = take_turn(given.steps)
                if turn:
                    seconds.append(taken)
    plain, noted = turns
    ratios = [b / a for a, b in zip(plain, noted, strict=True)]
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"recipe lm, {given.layers} layers x {given.hidden_size}, {world.size} ranks, {given.turns} turns of"
            f" {given.steps} steps each",
            f"a step of a plain loop:     {machine.spread([1e3 * s for s in plain], 2)} ms",
            f"a step with all of it:      {machine.spread([1e3 * s for s in noted], 2)} ms",
            f"ratio, turn by turn:        {machine.spread(ratios, 4)}",
            f"ratio of the medians:       {statistics.median(noted) / statistics.median(plain):.4f}",
        )
    )
    if world.rank == 0:
        print(table)
        if given.output:
            given.output.write_text(table + "\n")


def side(world, recipe, folder: Path, is_noted: bool):  # type: ignore[no-untyped-def]
    """Return what takes a turn of steps of a training of its own and returns the seconds of a step. Collective."""
    if world.rank == 0:
        folder.mkdir()
    world.barrier("folder")
    task = recipe.build(lambda text: None)
    log = MetricLog(None, [JsonLines(RunDirectory(folder))] if world.rank == 0 else [])
    job = settle(task, recipe, world, RunDirectory(folder), log)
    training = start_training(job)
    if not is_noted:
        training.components[:] = [one for one in training.components if not isinstance(one, _HEALTH)]
    progress = progress_of(world) if is_noted else NoProgress()
    plain, stopwatch = Plain(job, training), Stopwatch(training.step, partial(counts_of, world))
    log.begin(training.step, job.num_steps)

    def turn(steps: int) -> float:
        world.progress = progress
        for _ in range(_SETTLING_STEPS):
            train_step(job, training)
        world.barrier("turn")
        started = time.perf_counter()
        for _ in range(steps):
            train_step(job, training)
        log.write(training.step, step_metrics(job, training, stopwatch) if is_noted else plain.metrics())
        world.barrier("turned")
        return (time.perf_counter() - started) / steps

    return turn


if __name__ == "__main__":
    main()
