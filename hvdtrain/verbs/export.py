"""The verb `export`: a run's model as a directory that transformers, or torch alone, loads."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hvdtrain.errors import ConfigError, DataError, megabytes, reason_of
from hvdtrain.process.run_files import CHECKPOINTS
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.manifest import MANIFEST, STATE
from hvdtrain.rundir.trained import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Trained, open_trained
from hvdtrain.settings.untrusted import read_json
from hvdtrain.verbs.loading import loading_of
from hvdtrain.verbs.options import ExportOptions
from hvdtrain.verbs.programs import further_files

_WEIGHTS = "model.safetensors"
_OF_EXPORTS = {"config.json", _WEIGHTS, ADAPTER_WEIGHTS}
_OF_CHECKPOINTS = {MANIFEST, STATE, CHECKPOINTS}
"""Names of which an export has none."""


@dataclass(frozen=True)
class Names:
    """What the files of an export are called."""

    weights: str = _WEIGHTS
    left_out: tuple[str, ...] = ()
    """Of the run's own files: those that are not copied."""


def export(options: ExportOptions) -> int:
    """Answer `export RUN_DIR`; returns the exit code."""
    output = options.output or RunDirectory(options.run_dir).export
    _check_output(output, options)
    trained = open_trained(options.run_dir, options.checkpoint)
    weights, names = _weights_of(trained, options.merged)
    if options.dtype != "as-trained":
        dtype = getattr(torch, options.dtype)
        weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    how = loading_of(trained, options.merged)
    further = further_files(how, weights, options)
    try:
        num_bytes = write_model(trained.folder, weights, output, how.note, further, names)
    except (OSError, SafetensorError) as error:  # which safetensors raises where a disk is full
        raise ConfigError(f"{output} cannot be written: {reason_of(error)}") from error
    count = sum(tensor.numel() for tensor in weights.values())
    if trained.about:
        sys.stdout.write(f"{trained.about}\n")
    sys.stdout.write(
        f"exported {trained.source} ({count:,} numbers, {megabytes(num_bytes)})\n"
        f"to {output}: {how.hint.format(output=str(output))}\n"
    )
    return 0


def _check_output(output: Path, options: ExportOptions) -> None:
    """Raise ConfigError where an export would take the place of something else than an earlier one."""
    if output.is_symlink() and not output.exists():
        raise ConfigError(f"{output} is a link to something that is not there: choose another --output")
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"{output} is no directory: choose another --output, or move it away")
    place, run = output.resolve(), options.run_dir.resolve()
    if Path.cwd().is_relative_to(place) or run.is_relative_to(place):
        raise ConfigError(f"{output} would be replaced as a whole, with what lies in it: name a new --output")
    try:
        held = {path.name for path in place.iterdir()}
    except OSError as error:
        raise ConfigError(f"{output} cannot be read ({reason_of(error)}): choose another --output") from error
    if held and not options.overwrite:
        raise ConfigError(f"{output} is not empty: choose another --output, or give --overwrite")
    is_of_run = any(place.is_relative_to(run / name) for name in (CHECKPOINTS, "model", "logs"))
    if held and (is_of_run or held & _OF_CHECKPOINTS or not held & _OF_EXPORTS):
        raise ConfigError(f"{output} is no earlier export, and is left as it is: choose another --output")


def _weights_of(trained: Trained, is_merged: bool) -> tuple[dict[str, Tensor], Names]:
    """Return what is written, and to files of which names.

    Raises:
        ConfigError: there is nothing to merge.
        DataError: the base model of adapters cannot be loaded.
    """
    if not trained.is_adapter:
        if is_merged:
            raise ConfigError(f"--merged has no effect: {trained.source} has no adapters, it is a whole model")
        return trained.weights, Names()
    from hvdtrain.recipes.transformers_models.lora import BASE_FILE, in_peft_names, merged_weights
    from hvdtrain.recipes.transformers_models.writing import load_with_adapters

    if is_merged:
        return merged_weights(load_with_adapters(trained)), Names(left_out=(ADAPTER_CONFIG, BASE_FILE))
    left_out = ("config.json", "generation_config.json")  # they are the base model's
    return in_peft_names(trained.weights), Names(ADAPTER_WEIGHTS, left_out)


def _copy(source: Path, target: Path) -> None:
    """Copy a regular file, or a folder of such, as of several chat templates; what a link leads to is not the model's.

    Raises:
        DataError: it is something else.
    """
    kind = source.lstat().st_mode
    if stat.S_ISDIR(kind):
        target.mkdir()
        for path in source.iterdir():
            _copy(path, target / path.name)
        return
    if not stat.S_ISREG(kind):
        raise DataError(f"{source} is no regular file: remove it, or put a copy of what it leads to in its place")
    shutil.copy(source, target)


def write_model(
    files: Path,
    weights: dict[str, Tensor],
    output: Path,
    note: str = "",
    further: Mapping[str, bytes] | None = None,
    names: Names | None = None,
) -> int:
    """Write weights beside copies of `files`, all at once; returns the bytes of the weights.

    Args:
        files: folder of what is copied; it may hold nothing.
        weights: by name.
        output: the folder to write.
        note: what README.md there says; nothing: there is none.
        further: what other files hold, by name.
        names: of the file of weights, and of what is not copied.

    Raises:
        DataError: one of `files` is no regular file.
        OSError: it cannot be written; what was there before is still there.
    """
    names = names or Names()
    output = output.resolve()  # a link stays, and leads to what is new
    temporary = output.with_name(f".{output.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for path in files.iterdir() if files.is_dir() else ():
            if path.name not in names.left_out:
                _copy(path, temporary / path.name)
        if (temporary / "config.json").exists():
            _write_config(files, weights, temporary)
        if note:
            (temporary / "README.md").write_text(note, encoding="utf-8")
        for name, content in (further or {}).items():
            (temporary / name).write_bytes(content)
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        # transformers refuses a file that does not say which framework wrote it.
        safetensors.torch.save_file(weights, temporary / names.weights, metadata={"format": "pt"})
        num_bytes = (temporary / names.weights).stat().st_size
        umask = os.umask(0)
        os.umask(umask)
        for path in temporary.iterdir():  # safetensors makes files that only their owner can read
            if path.is_file():
                path.chmod(0o666 & ~umask)
        _replace(output, temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return num_bytes


def _replace(output: Path, new: Path) -> None:
    """Put a new export in the place of an earlier one, which stays where that fails."""
    before = output.with_name(f".{output.name}.before-{os.getpid()}")
    if output.exists():
        output.rename(before)
    try:
        new.rename(output)
    except OSError:
        if before.exists():
            before.rename(output)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _write_config(files: Path, weights: dict[str, Tensor], folder: Path) -> None:
    config = read_json(files / "config.json")
    kinds = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    config["dtype"] = str(max(kinds, key=lambda kind: kind.itemsize)).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
