"""What a training run has logged that an answer can be made of."""

from __future__ import annotations

import math
from pathlib import Path

from hvdtrain.errors import ConfigError, reason_of
from hvdtrain.optim.noise import NoiseScale, noise_of_training
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.metrics import read_metrics


def noise_of_run(run_dir: Path) -> NoiseScale:
    """Return the noise scale of a whole training from what `--health.noise-scale` has logged.

    Raises:
        ConfigError: there is no such run, or it has logged none.
    """
    run = RunDirectory(run_dir)
    file, manifest = run.metrics, run.checkpoints.newest_manifest(is_whole=False)
    try:
        lines, _ = read_metrics(file)
    except OSError as error:
        raise ConfigError(f"--noise-from {run_dir}: {file} cannot be read ({reason_of(error)})") from error
    logged = [line for line in lines if isinstance(line.get("train/noise_scale", ""), float | int | None)]
    if not logged or manifest is None or manifest.global_batch_size is None:
        raise ConfigError(
            f"--noise-from {run_dir} has no noise scale: train it with --health.noise-scale, on two ranks or more"
        )
    steps = [line["step"] for line in logged]
    lengths = [step - before for before, step in zip([0, *steps], steps, strict=False)]
    # What is not finite is logged as null.
    scales = [math.inf if line["train/noise_scale"] is None else line["train/noise_scale"] for line in logged]
    return noise_of_training([*zip(lengths, scales, strict=True)], manifest.global_batch_size)


def find_noise(path: Path) -> NoiseScale | None:
    """Return the noise scale that a run in this directory has logged, None where there is no such run."""
    try:
        return noise_of_run(path)
    except ConfigError:
        return None
