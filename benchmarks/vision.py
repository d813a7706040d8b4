"""The recipe resnet against a Horovod loop with a DataLoader and torchvision's reference under DDP; input alone.

    python benchmarks/vision.py --ranks 2 --workers 1 --steps 40 --repeats 5 --output benchmarks/results/vision.txt

Images are JPEG files of 500x375 pixels, cut from the two photographs that scikit-learn brings along. Each runner is
launched in turn, `--repeats` times; a launch gives the median time of a step, without warm-up. Ratios are of launches
that followed each other. The others are in bare_vision_loops.py. Input alone: batches of augmented images by as many
workers, ours and a DataLoader's, in one process that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

WINDOW = 5  # as in bare_vision_loops, which needs torchvision
RUNNERS = ("hvdtrain", "horovod", "ddp")
INPUTS = ("hvdtrain", "DataLoader")
SKIPPED_WINDOWS = 2  # warm-up
CLASSES = 10


def write_photographs(folder: Path, count: int) -> None:
    """Write parts of real photographs as JPEG files, in a folder for each of ten classes."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(count + CLASSES):
        photograph = photographs[number % len(photographs)]
        left, top = int(rng.integers(photograph.width - 500)), int(rng.integers(photograph.height - 375))
        place = folder / ("train" if number < count else "val") / f"class {number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        photograph.crop((left, top, left + 500, top + 375)).save(place / f"{number}.jpg", quality=90)


def run(command: list[str], **environ: str) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: it fails.
    """
    given = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environ
    done = subprocess.run(command, env=given, cwd=REPOSITORY, timeout=1800, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def launch(runner: str, root: Path, given: argparse.Namespace) -> float:
    """Return the median seconds of a step in one launch of a runner."""
    with tempfile.TemporaryDirectory() as folder:
        mpi = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(given.ranks), sys.executable]
        environ = {"OMP_NUM_THREADS": str(given.threads), "OMPI_MCA_mpi_yield_when_idle": "1"}
        if runner == "hvdtrain":
            settings = {
                "--data.root": root, "--model.name": given.model, "--data.image-size": given.size, "--run-dir": folder,
                "--data.workers": given.workers, "--train.steps": given.steps, "--train.micro-batch-size": given.batch,
                "--train.accum-steps": 1, "--log.every": WINDOW, "--optim.warmup-steps": 0, "--optim.peak-lr": 0.01,
                "--optim.lr-rule": "none",
            }  # fmt: skip
            words = [str(word) for pair in settings.items() for word in pair]
            run([*mpi, "-m", "hvdtrain", "train", "resnet", *words], **environ)
            lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
            steps = [line["time/step_s"] for line in lines if "time/step_s" in line]
        else:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            start = mpi if runner == "horovod" else [*torchrun, str(given.ranks)]
            steps = bare(start, runner, root, Path(folder) / "times.json", given, environ)
    return statistics.median(steps[SKIPPED_WINDOWS:])


def bare(
    start: list[str], runner: str, root: Path, times: Path, given: argparse.Namespace, environ: dict[str, str]
) -> list[float]:
    """Run a loop of bare_vision_loops; returns what it has measured."""
    names = ("model", "size", "batch", "workers", "steps", "threads")
    description = {name: getattr(given, name) for name in names}
    description |= {"runner": runner, "root": str(root), "times": str(times), "classes": CLASSES}
    run([*start, str(Path(__file__).with_name("bare_vision_loops.py")), json.dumps(description)], **environ)
    found: list[float] = json.loads(times.read_text())
    return found


def our_input(root: Path, given: argparse.Namespace) -> float:
    """Return images a second that hvdtrain's loader reads, by its workers alone."""
    from hvdtrain.data.image_files import find_images
    from hvdtrain.data.image_samples import ImageSamples
    from hvdtrain.data.images_config import ImagesConfig
    from hvdtrain.data.loader import Loader, Reading
    from hvdtrain.data.order import SampleOrder
    from hvdtrain.settings import BatchPlan

    config = ImagesConfig(root=str(root), image_size=given.size)
    data = ImageSamples(find_images(config).train, config, is_training=True)
    order = SampleOrder(len(data), BatchPlan(given.batch, given.batch, 1, 1), 0, drop_last=True)
    rates = []
    with Loader(data, order, 0, reading=Reading(workers=given.workers)) as loader:
        for window in range(given.steps // WINDOW):
            started = time.perf_counter()
            for number in range(WINDOW):
                loader.read(window * WINDOW + number, 0)
            rates.append(WINDOW * given.batch / (time.perf_counter() - started))
    return statistics.median(rates[SKIPPED_WINDOWS:])


def inputs(root: Path, given: argparse.Namespace) -> dict[str, float]:
    """Return images a second and worker of both, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        ours = our_input(root, given)
        rates = bare([sys.executable], "input", root, Path(folder) / "times.json", given, {"OMP_NUM_THREADS": "1"})
    share = max(1, given.workers)
    return {"hvdtrain": ours / share, "DataLoader": statistics.median(rates[SKIPPED_WINDOWS:]) / share}


def rows(figures: dict[str, list[float]], scale: float, is_rate: bool) -> list[str]:
    """Return a line for each: the figure, and hvdtrain's against it."""
    ours = figures["hvdtrain"]
    lines = []
    for name, values in figures.items():
        ratios = [a / b for a, b in zip(ours, values, strict=True)]
        lines.append(f"{name:12} {machine.spread([scale * v for v in values], 1):28} {machine.spread(ratios)}")
    head = "images/s a worker            hvdtrain's rate / this one's" if is_rate else (
        "ms a step                    hvdtrain's time / this one's"
    )  # fmt: skip
    return [f"{'':12} {head}", *lines]


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--workers", type=int, default=1, help="of each rank")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images of a rank")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {runner: [] for runner in RUNNERS}
    rates: dict[str, list[float]] = {name: [] for name in INPUTS}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_photographs(root, given.images)
        for repeat in range(given.repeats):
            for runner in RUNNERS:
                seconds[runner].append(launch(runner, root, given))
                print(f"repeat {repeat + 1}: {runner} {1e3 * seconds[runner][-1]:.1f} ms", file=sys.stderr, flush=True)
            for kind, rate in inputs(root, given).items():
                rates[kind].append(rate)
                print(f"repeat {repeat + 1}: input of {kind} {rate:.1f} images/s", file=sys.stderr, flush=True)
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"{given.model}, {given.batch} images of {given.size}x{given.size} a rank, {given.ranks} ranks of"
            f" {given.threads} thread and {given.workers} worker, fp32; {given.repeats} interleaved launches of"
            f" {given.steps} steps; median [quartiles]",
            "",
            *rows(seconds, 1e3, is_rate=False),
            "",
            f"input alone: JPEG files of 500x375, random crop of {given.size}x{given.size}, mirrored",
            "",
            *rows(rates, 1, is_rate=True),
        )
    )
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
