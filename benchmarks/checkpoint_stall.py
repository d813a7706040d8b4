"""How long does a checkpoint hold up training: written in the background, against written while training waits?

    python benchmarks/checkpoint_stall.py                          one process
    horovodrun -np 2 python benchmarks/checkpoint_stall.py         ranks

Blocks of steps without a save, with one in the background and with one that is waited for take turns in one process.
The stall is the time in which no step is taken; the cost is how much longer a block takes than one without a save,
which also counts that the writing thread takes processor time from training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from hvdtrain.process.launch import prepare_process  # noqa: E402

prepare_process()  # threads, before torch starts

import machine  # noqa: E402

import hvdtrain  # noqa: E402
from hvdtrain.models.config import DecoderConfig  # noqa: E402
from hvdtrain.recipes.lm import StreamConfig, lm  # noqa: E402
from hvdtrain.rundir.checkpoints import Checkpoints  # noqa: E402
from hvdtrain.rundir.directory import RunDirectory  # noqa: E402
from hvdtrain.rundir.log import MetricLog  # noqa: E402
from hvdtrain.settings import CheckpointConfig, TrainConfig  # noqa: E402
from hvdtrain.trainer import settle, train_step  # noqa: E402
from hvdtrain.trainer.saver import Saver  # noqa: E402
from hvdtrain.trainer.state import start_training  # noqa: E402

MODES = ("no save", "background", "waited for")


def measure(given: argparse.Namespace, folder: Path) -> str:
    """Return the table. Collective."""
    world = hvdtrain.init()
    folder = world.broadcast_object(folder, "folder")
    recipe = replace(
        lm(),
        train=TrainConfig(steps=10**6, global_batch_size=2 * world.size),
        model=DecoderConfig(num_layers=given.layers, hidden_size=given.hidden_size, num_heads=8),
        data=StreamConfig(sequence_length=64, val_fraction=0.01),
        checkpoint=CheckpointConfig(keep_last=1),
    )
    task = recipe.build(lambda text: None)
    job = settle(task, recipe, world, RunDirectory(folder), MetricLog(None, []))
    training = start_training(job)
    stalls: dict[str, list[float]] = {mode: [] for mode in MODES}
    blocks: dict[str, list[float]] = {mode: [] for mode in MODES}
    with Saver(job) as saver:
        for repeat in range(given.repeats + 1):  # the first is a warm-up
            for mode in MODES:
                world.barrier("block")
                started = time.perf_counter()
                for _ in range(given.every):
                    train_step(job, training)
                before = time.perf_counter()
                if mode != "no save":
                    saver.save(training, {})
                if mode == "waited for":
                    saver.finish()
                stall = time.perf_counter() - before
                for _ in range(given.every):  # the writing thread works beside these
                    train_step(job, training)
                world.barrier("end of block")
                if repeat:
                    blocks[mode].append(time.perf_counter() - started)
                    stalls[mode].append(stall)
                saver.finish()
    plain = statistics.median(blocks["no save"])
    saved = Checkpoints(folder / "checkpoints").by_step() if world.rank == 0 else {}
    size = sum(file.stat().st_size for file in saved[max(saved)].iterdir()) if saved else 0
    rows = []
    for mode in MODES[1:]:
        longer = [100 * (block / none - 1) for block, none in zip(blocks[mode], blocks["no save"], strict=True)]
        stall_ms, share = machine.spread([1e3 * s for s in stalls[mode]], 1), statistics.median(stalls[mode]) / plain
        rows.append(f"{mode:12}  {stall_ms:28}  {share:8.2%}  {machine.spread(longer, 2)}")
    ratio = statistics.median(w / b for w, b in zip(stalls["waited for"], stalls["background"], strict=True))
    return "\n".join(
        (
            machine.describe(),
            "",
            f"{task.model.num_parameters() / 1e6:.1f}M parameters, checkpoint of {size / 1e6:.0f} MB,"
            f" {world.size} ranks,"
            f" one save in {2 * given.every} steps of {1e3 * plain / 2 / given.every:.0f} ms,"
            f" {given.repeats} repeats",
            "",
            "save          stall, ms                     share     block longer by, %",
            *rows,
            "",
            f"a save that is waited for stalls training {ratio:.1f} times as long",
        )
    )


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--every", type=int, default=5, help="half the steps between two saves")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(given, Path(folder))
    if prepare_process().rank == 0:
        print(table)
        if given.output:
            given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
