"""The verb `export`: a run's model as a directory that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from hvdtrain.errors import ConfigError, DataError
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.trained import open_trained
from hvdtrain.settings.untrusted import read_json
from hvdtrain.verbs.options import ExportOptions


def export(options: ExportOptions) -> int:
    """Answer `export RUN_DIR`; returns the exit code."""
    output = options.output or RunDirectory(options.run_dir).export
    if output.exists() and any(output.iterdir()):
        if not options.overwrite:
            raise ConfigError(f"{output} is not empty: choose another --output, or give --overwrite")
        if not (output / "config.json").exists():
            raise ConfigError(f"{output} is no earlier export, and is left as it is: choose another --output")
    trained = open_trained(options.run_dir, options.checkpoint)
    weights = trained.weights
    if options.dtype != "as-trained":
        dtype = getattr(torch, options.dtype)
        weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    try:
        num_bytes = write_model(trained.folder, weights, output)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from error
    count = sum(tensor.numel() for tensor in weights.values())
    if trained.about:
        sys.stdout.write(f"{trained.about}\n")
    sys.stdout.write(
        f"exported {trained.source} ({count:,} parameters, {num_bytes / 1e6:.1f} MB)\n"
        f"to {output}: transformers.AutoModelForCausalLM.from_pretrained({str(output)!r})\n"
    )
    return 0


def _copy(source: Path, target: Path) -> None:
    """Copy a regular file; what a link or a pipe leads to is not the model's.

    Raises:
        DataError: it is something else.
    """
    if not stat.S_ISREG(source.lstat().st_mode):
        raise DataError(f"{source} is no regular file: remove it, or put a copy of what it leads to in its place")
    shutil.copy(source, target)


def write_model(files: Path, weights: dict[str, Tensor], output: Path) -> int:
    """Write weights beside copies of `files`, all at once; returns the bytes of the weights.

    Raises:
        DataError: one of `files` is no regular file.
        OSError: it cannot be written; what was there before is still there.
    """
    temporary = output.with_name(f".{output.name}.writing-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        for path in files.iterdir():
            _copy(path, temporary / path.name)
        config = read_json(files / "config.json")
        kinds = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
        config["dtype"] = str(max(kinds, key=lambda kind: kind.itemsize)).removeprefix("torch.")
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        # transformers refuses a file that does not say which framework wrote it.
        safetensors.torch.save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; all follow the user's umask.
        (temporary / "model.safetensors").chmod((temporary / "config.json").stat().st_mode & 0o777)
        num_bytes = (temporary / "model.safetensors").stat().st_size
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return num_bytes
