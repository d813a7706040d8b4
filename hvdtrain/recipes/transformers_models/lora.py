"""LoRA (arXiv:2106.09685) by the peft library: adapters of low rank beside a base model that never changes.

The base model's weights are read from where they came, whenever a run starts; no checkpoint holds them. What makes
that safe is their hash: a run goes on, is exported and generates with the same base weights, or not at all.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError, DataError, ResumeError
from hvdtrain.models.elsewhere import keep_elsewhere, weights_digest
from hvdtrain.recipes.transformers_models.probe import describe
from hvdtrain.rundir.trained import ADAPTER_CONFIG
from hvdtrain.settings.untrusted import read_json
from hvdtrain.trainer.component import Component

BASE_FILE = "base_model.json"
"""Beside peft's adapter_config.json: where the base model came from, and its hash."""
_NAME = "default"
"""What peft calls an adapter that nobody has named."""
_IN_PEFT = "base_model.model."
"""What stands before a parameter's name in peft's files."""


@dataclass(frozen=True)
class Adapters:
    """The shape of the adapters.

    Args:
        rank: of each.
        alpha: what they add is multiplied by alpha / rank.
        dropout: of their inputs.
        targets: names, or ends of names, of the layers that get one; none: every linear layer but the output.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Base:
    """Where frozen weights came from."""

    path: str
    """Directory or name on the hub."""
    sha256: str
    """Of the weights as they were loaded; empty in a dry run, which has none."""


def import_peft() -> Any:
    """Return the library.

    Raises:
        DataError: it is not installed, or cannot be imported.
    """
    try:
        import peft
    except Exception as error:  # what it imports may fail in many ways
        raise DataError(f"--model.lora-rank needs peft ({describe(error)}): pip install 'hvdtrain[hf]'") from error
    return peft


def add_adapters(model: nn.Module, adapters: Adapters, path: str, seed: int) -> Base:
    """Put adapters into a model, in place, and freeze all else; returns what the base model is known by.

    To begin with they add nothing: the model computes what it did.

    Args:
        model: of transformers, as it was loaded.
        adapters: their shape.
        path: where the model came from.
        seed: of the adapters' first factors.

    Raises:
        ConfigError: the model has no such layers, or peft has no adapters for them.
    """
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    folder = Path(path).expanduser()
    base = Base(str(folder.resolve()) if folder.is_dir() else path, "" if is_empty else weights_digest(model))
    peft = import_peft()
    config = peft.LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        lora_dropout=adapters.dropout,
        target_modules=list(adapters.targets) or "all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.path,
    )
    whole: Any = model
    ends = [layer for layer in (whole.get_input_embeddings(), whole.get_output_embeddings()) if layer is not None]
    torch.manual_seed(seed)
    _inject(peft, config, model, adapters.targets)
    inner = {id(getattr(layer, "base_layer", None)) for layer in adapter_layers(model)}
    if any(id(layer) in inner for layer in ends):
        raise ConfigError(
            f"--model.lora-targets {' '.join(adapters.targets)}: one of them is the model's embedding or its output,"
            " which have no adapters here: name linear layers between them"
        )
    _freeze_base(model)
    return base


def _inject(peft: Any, config: Any, model: nn.Module, targets: Sequence[str]) -> None:
    named = f"--model.lora-targets {' '.join(targets)}" if targets else "--model.lora-rank"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the weights of a layer are laid out, which peft finds out itself
            peft.inject_adapter_in_model(config, model, _NAME)
    except Exception as error:  # whatever peft raises for a model or names that it does not know
        known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
        raise ConfigError(
            f"{named}: peft cannot put adapters there ({describe(error)}); this model's linear layers are"
            f" {', '.join(known) or 'none'}"
        ) from error
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in _adapted(model)):
            raise ConfigError(f"{named}: no layer of this model is called {target}")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # as transformers' GPT-2 has it


def _freeze_base(model: nn.Module) -> None:
    own = {id(parameter) for layer in adapter_layers(model) for parameter in _own_parameters(layer)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    keep_elsewhere(model)


def _own_parameters(layer: Any) -> Iterator[nn.Parameter]:
    for name in layer.adapter_layer_names:
        part = getattr(layer, name, None)
        if isinstance(part, nn.Module):
            yield from part.parameters()


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return peft's layers in a model."""
    return [module for _, module in _adapted(model)]


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):
            yield name, module


class BaseWeights(Component):
    """Keeps in each checkpoint which base weights it belongs to."""

    name = "base_weights"

    def __init__(self, base: Base) -> None:
        self._base = base

    def state_dict(self) -> dict[str, Any]:
        """Return their hash."""
        return {"sha256": self._base.sha256}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare them.

        Raises:
            ResumeError: they are others now.
        """
        if state["sha256"] != self._base.sha256:
            raise ResumeError(
                f"the weights in {self._base.path} are not those that this run's adapters were trained beside: put"
                " these back, or choose another --run-dir"
            )


def write_adapter_files(folder: Path, model: nn.Module, base: Base) -> None:
    """Write what says how the adapters fit and to what: peft's file, and the base model's hash."""
    whole: Any = model
    values = {**whole.peft_config[_NAME].to_dict(), "inference_mode": True}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True, default=_plain) + "\n")
    (folder / BASE_FILE).write_text(json.dumps({"path": base.path, "sha256": base.sha256}, indent=2) + "\n")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def in_peft_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a run's weights by the names that peft's files give them; what is no adapter's is left out."""
    return {
        _IN_PEFT + name.replace(f".{_NAME}.", "."): tensor for name, tensor in weights.items() if f".{_NAME}." in name
    }


def in_own_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of peft's file by the names that they have in the model."""
    found = {}
    for name, tensor in weights.items():
        stem, _, last = name.removeprefix(_IN_PEFT).rpartition(".")
        found[f"{stem}.{_NAME}.{last}"] = tensor
    return found


def load_adapted(
    folder: Path, weights: Mapping[str, Tensor], source: str, load_base: Callable[[str], nn.Module]
) -> nn.Module:
    """Return the base model with trained adapters.

    Args:
        folder: holds what `write_adapter_files` has written.
        weights: of the adapters, by the names in the model.
        source: what a person calls them.
        load_base: returns the model of a directory or a name.

    Raises:
        DataError: the base weights are not those that they were trained beside, or the adapters are of another model.
    """
    values = read_json(folder / ADAPTER_CONFIG)
    path, sha256 = _base_of(folder, values)
    model = load_base(path)
    if sha256 and weights_digest(model) != sha256:
        raise DataError(
            f"the weights in {path} are not those that the adapters of {source} were trained beside: put these back"
        )
    if all(name.startswith(_IN_PEFT) for name in weights):
        weights = in_own_names(weights)
    peft = import_peft()
    try:
        config = peft.LoraConfig(**{name: values[name] for name in values if name not in _NOT_READ})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(config, model, _NAME)
        _, unknown = model.load_state_dict(dict(weights), strict=False)
    except Exception as error:  # whatever a file of odd values makes peft raise
        raise DataError(f"the adapters of {source} cannot be loaded ({describe(error)})") from error
    own = {name for name, _ in model.named_parameters() if f".{_NAME}." in name}
    wrong = sorted((own - weights.keys()) | set(unknown))
    if wrong:
        raise DataError(f"the adapters of {source} do not fit {path}: {wrong[0]}")
    return model


# peft finds the kind out by itself.
_NOT_READ = ("peft_type", "auto_mapping", "peft_version")


def _base_of(folder: Path, values: Mapping[str, Any]) -> tuple[str, str]:
    """Return where the base model is, and its hash; an adapter that somebody else has made has none."""
    if (folder / BASE_FILE).is_file():
        about = read_json(folder / BASE_FILE)
        if isinstance(about.get("path"), str) and isinstance(about.get("sha256"), str):
            return about["path"], about["sha256"]
        raise DataError(f"{folder / BASE_FILE} does not say where the base model is")
    path = values.get("base_model_name_or_path")
    if not isinstance(path, str):
        raise DataError(f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path")
    return path, ""


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Add the adapters to the base weights, in place, and return them by the names of the base model."""
    layers = dict(_adapted(model))
    for layer in layers.values():
        layer.merge()
    own = {id(parameter) for layer in layers.values() for parameter in _own_parameters(layer)}
    return {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in (*model.named_parameters(), *_saved_buffers(model))
        if id(parameter) not in own
    }


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer
