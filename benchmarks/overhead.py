"""What a step costs besides the model: a network of 784-128-64-10, batch 64, by hvdtrain and by the shortest loops.

    python benchmarks/overhead.py --ranks 1
    python benchmarks/overhead.py --ranks 2 --stock FOLDER
    python benchmarks/overhead.py --mnist

One rank: the loop in bare torch. Several: DistributedDataParallel on Gloo, and bare Horovod with its own cycle time
(1 ms) and with a tenth of it: as hvdtrain's set-up builds it, with an engine that waits better, and as it was released,
from FOLDER, where an unedited 0.28.1 was installed by `pip install --target` (left out without it). `--mnist`: samples
a second of the recipe mnist, of a textbook's script (torchvision's transforms, image by image, in a DataLoader) and of
bare torch on tensors; the images are random, of which no runner is any slower.

Each runner is launched in turn, `--repeats` times, one thread a rank; a launch gives the median of the windows of 100
steps, without the first ones. Ratios are of launches that followed each other. "torch's mm" is hvdtrain with
`--model.linear torch`: the same matrix products as the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
from overhead_recipe import BATCH, WINDOW  # noqa: E402

OURS = {"hvdtrain": "auto", "torch's mm": "torch"}  # runner -> --model.linear
ONE_RANK = ("bare torch",)
SEVERAL_RANKS = ("horovod 1 ms", "horovod 0.1 ms", "stock 1 ms", "stock 0.1 ms", "ddp")
MNIST = ("script", "bare torch")
SKIPPED_WINDOWS = 2  # warm-up


def launcher(runner: str, ranks: int) -> list[str]:
    """Return the command that starts this runner's ranks."""
    if ranks == 1:
        return [sys.executable]
    if runner == "ddp":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), sys.executable]


def environment(runner: str, stock: Path | None) -> dict[str, str]:
    """Return the environment of a launch, in which ranks have one thread and yield while they wait, as hvdtrain's."""
    paths = [*([str(stock.resolve())] if stock and runner.startswith("stock") else []), str(REPOSITORY)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if runner != "ddp":
        environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    if runner.startswith(("horovod", "stock")):
        environ["HOROVOD_CYCLE_TIME"] = runner.split()[1]
    return environ


def launch(runner: str, given: argparse.Namespace, root: Path) -> float:
    """Return the median seconds of a step in one launch of a runner."""
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        command = launcher(runner, given.ranks)
        if runner in OURS:
            settings = ["--train.steps", str(given.steps), "--model.linear", OURS[runner], "--log.every", str(WINDOW)]
            recipe = str(Path(__file__).with_name("overhead_recipe.py"))
            of_mnist = ["mnist", "--data.root", str(root)]
            command += ["-m", "hvdtrain", "train", *(of_mnist if given.mnist else [recipe]), *settings]
            command += ["--run-dir", folder]
        else:
            loops = str(Path(__file__).with_name("overhead_loops.py"))
            command += [loops, runner, str(given.steps), str(times), str(root)]
        done = subprocess.run(
            command, env=environment(runner, given.stock), timeout=900, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{runner} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        if runner in OURS:
            lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
            steps = [line["time/step_s"] for line in lines if "time/step_s" in line]
        else:
            steps = json.loads(times.read_text())
    return statistics.median(steps[SKIPPED_WINDOWS:])


def write_images(root: Path) -> None:
    """Write random images where the files of MNIST are looked for."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", 60_000), ("t10k", 1_000)):
        images, labels = os.urandom(count * 784), bytes(i % 10 for i in range(count))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels)


def table_of(seconds: dict[str, list[float]], given: argparse.Namespace) -> str:
    """Return the result: times or rates of all runners, and hvdtrain's against each."""
    ours = seconds["hvdtrain"]
    rows = []
    for runner, times in seconds.items():
        figures = [BATCH * given.ranks / s for s in times] if given.mnist else [1e3 * s for s in times]
        ratios = [b / a if given.mnist else a / b for a, b in zip(ours, times, strict=True)]
        rows.append(f"{runner:16} {machine.spread(figures, 0 if given.mnist else 3):28} {machine.spread(ratios)}")
    head = "samples/s                    hvdtrain's rate / this one's"
    head = head if given.mnist else "ms a step                    hvdtrain's time / this one's"
    what = "recipe mnist" if given.mnist else "784-128-64-10"
    return "\n".join(
        (
            machine.describe(),
            "",
            f"{what}, batch {BATCH} a rank, SGD; ranks: {given.ranks}, of one thread; {given.repeats} interleaved"
            f" launches of {given.steps} steps; median [quartiles]",
            "",
            f"{'runner':16} {head}",
            *rows,
        )
    )


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--mnist", action="store_true", help="the recipe mnist against a textbook's script")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--runners", nargs="+", help="default: all")
    parser.add_argument("--stock", type=Path, help="folder of an unedited Horovod")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    several = [name for name in SEVERAL_RANKS if given.stock or not name.startswith("stock")]
    others = MNIST if given.mnist else ONE_RANK if given.ranks == 1 else several
    if given.mnist and given.ranks != 1:
        parser.error("--mnist is for one rank")
    runners = given.runners or [*OURS, *others]
    if "hvdtrain" not in runners or {*runners} - {*OURS, *others}:
        parser.error(f"--runners are hvdtrain and some of {', '.join((*OURS, *others)[1:])}")
    seconds: dict[str, list[float]] = {runner: [] for runner in runners}
    with tempfile.TemporaryDirectory() as folder:
        if given.mnist:
            write_images(Path(folder))
        for repeat in range(given.repeats):
            for runner in runners:
                seconds[runner].append(launch(runner, given, Path(folder)))
                print(f"repeat {repeat + 1}: {runner} {1e3 * seconds[runner][-1]:.3f} ms", file=sys.stderr, flush=True)
    table = table_of(seconds, given)
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
