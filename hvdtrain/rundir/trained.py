"""A trained model on disk: the directory of a run, or one that was exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hvdtrain.errors import CheckpointError, DataError
from hvdtrain.models.interchange import read_weights
from hvdtrain.process.run_files import BEST, LATEST, runs_in
from hvdtrain.rundir.checkpoint import Checkpoint, load_checkpoint
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.settings.untrusted import read_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""peft's files of adapters, which belong to a base model somewhere else."""


@dataclass(frozen=True)
class Trained:
    """A model's weights, and where the files lie that tell what they are."""

    folder: Path
    """Holds config.json, and the tokenizer of a language model; neither for a recipe that does not say what it is."""
    weights: dict[str, Tensor]
    source: str
    """What a person calls it."""
    about: str = ""
    """What the weights are, if they are not those of the last step."""

    @property
    def is_adapter(self) -> bool:
        """Return whether the weights are adapters, beside a base model somewhere else."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    @property
    def model_type(self) -> str:
        """Return what `config.json` says that the model is; nothing where it is not there, or does not say."""
        if not (self.folder / "config.json").is_file():
            return ""
        return str(read_json(self.folder / "config.json").get("model_type", ""))


def open_trained(path: Path, which: str) -> Trained:
    """Read a run's checkpoint (latest, best, or of a step) and verify it, or read an exported directory.

    Raises:
        DataError: there is no trained model in `path`, or no such checkpoint; names those that there are.
    """
    run = RunDirectory(path)
    if not run.checkpoints.folder.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            return Trained(path, read_weights(path, ADAPTER_WEIGHTS), str(path))
        if (path / "config.json").is_file():
            return Trained(path, read_weights(path), str(path))
        raise DataError(
            f"{path} is neither a run's directory (with checkpoints/) nor an export (with config.json){runs_in(path)}"
        )
    checkpoint = _find(run, which)
    try:
        weights, about = _exported(load_checkpoint(checkpoint))
    except CheckpointError as error:
        raise DataError(f"{error}; choose another one with --checkpoint") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{checkpoint} does not say which weights are exported; choose another one") from error
    return Trained(run.model, weights, str(checkpoint), about)


def _exported(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], str]:
    """Return the weights that were evaluated, such as a moving average, in the model's types, and what they are."""
    exported = checkpoint.state.get("exported")
    if not exported:
        return checkpoint.weights, ""
    instead = checkpoint.state["components"][exported["component"]]["weights"]
    own = checkpoint.weights
    return {name: instead.get(name, tensor).to(tensor.dtype) for name, tensor in own.items()}, exported["about"]


def _find(run: RunDirectory, which: str) -> Path:
    found = run.checkpoints.by_step()
    pointed = run.checkpoints.named(which) if which in (LATEST, BEST) else None
    if pointed is not None:
        return pointed
    if which.isdecimal() and int(which) in found:
        return found[int(which)]
    there = f"of steps {', '.join(map(str, found))}" if found else "none"
    raise DataError(f"{run} has no checkpoint '{which}': there are {there}; say latest, best or a step")
