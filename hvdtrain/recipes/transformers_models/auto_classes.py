"""Models of transformers of any kind: made, or loaded from a run, by the auto class of their kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdtrain.errors import ConfigError, DataError
from hvdtrain.recipes.transformers_models.loading import check_files, check_whole, import_transformers, why, why_not
from hvdtrain.recipes.transformers_models.probe import describe
from hvdtrain.rundir.trained import Trained


def load_as(
    kind: str,
    path: str | None,
    config: Any,
    changes: Mapping[str, Any],
    seed: int,
    *,
    attention: str = "auto",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Return a model in fp32, ready to be trained.

    Args:
        kind: name of the auto class, such as AutoModelForSeq2SeqLM.
        path: directory or name of a model to begin with; None for one with new weights.
        config: its config.json, or a configuration, if there is no path.
        changes: values of the configuration that are others here; a head that does not fit them is made anew.
        seed: of new weights.
        attention: "sdpa" or "eager", or "auto" for what transformers chooses.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        DataError: there is none of this kind.
    """
    library = import_transformers()
    auto = getattr(library, kind)
    how: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    if attention != "auto":
        how["attn_implementation"] = attention
    torch.manual_seed(seed)
    try:
        if path is not None:
            check_files(path)
            check_whole(path)
            model = auto.from_pretrained(path, ignore_mismatched_sizes=bool(changes), **changes, **how)
            check_whole(path, model)
        else:
            settings = config
            if isinstance(config, Path):
                settings = library.AutoConfig.from_pretrained(config, trust_remote_code=trust_remote_code)
            for name, value in _spread(settings, changes).items():
                setattr(settings, name, value)
            model = auto.from_config(settings, **how)
    except DataError:
        raise
    except Exception as error:  # whatever a model's files make its code raise
        reason = why(error) if path is None else why_not(path, error)
        raise DataError(f"no model for {kind} comes from {path or config} ({reason})") from error
    model.config.architectures = [type(model).__name__]
    trained: nn.Module = model.train()
    return trained


def _spread(settings: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes of a configuration, with those of values that were copied from it, such as decoder_vocab_size."""
    copies = {
        name: changes["vocab_size"]
        for name, value in settings.to_dict().items()
        if "vocab_size" in changes and name.endswith("_vocab_size") and value == settings.vocab_size
    }
    return {**changes, **copies}


def load_trained(trained: Trained, kind: str) -> nn.Module:
    """Return a trained model in evaluation mode, on the GPU if there is one.

    Raises:
        DataError: the weights do not fit their config.json.
    """
    library = import_transformers()
    check_files(str(trained.folder))
    try:
        config = library.AutoConfig.from_pretrained(trained.folder)
        model: Any = getattr(library, kind).from_config(config, dtype=torch.float32)
        missing, unknown = model.load_state_dict(trained.weights, strict=False)
        model.tie_weights()
    except Exception as error:  # whatever a model's files make its code raise
        raise DataError(f"no model comes from {trained.source} ({describe(error)})") from error
    known = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    known |= set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # such as positions that a formula gives
    lost = [name for name in missing if name not in known]
    if lost or unknown:
        raise DataError(f"the weights of {trained.source} do not fit its config.json: {(lost + unknown)[0]}")
    if (trained.folder / "generation_config.json").exists():
        model.generation_config = library.GenerationConfig.from_pretrained(trained.folder)
    loaded: nn.Module = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return loaded


def needs(library: str, what: str, extra: str) -> Any:
    """Return an installed library.

    Raises:
        ConfigError: it is not there.
    """
    import importlib

    try:
        return importlib.import_module(library)
    except (ImportError, OSError) as error:  # OSError: a library of the system is missing below it
        raise ConfigError(f"{what} needs {library} ({error}): pip install 'hvdtrain[{extra}]'") from error
