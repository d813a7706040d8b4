"""Tokenizers and models of transformers: from disk or the hub, made ready to be trained, and written back."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvdtrain.data.text.chat import check_template
from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.interchange import indexed_files
from hvdtrain.process.run_files import CHECKPOINTS
from hvdtrain.recipes.transformers_models.probe import describe
from hvdtrain.rundir.trained import ADAPTER_CONFIG
from hvdtrain.settings.untrusted import read_json


def import_transformers() -> Any:
    """Return the library, silenced.

    Raises:
        DataError: it is not installed, or cannot be imported.
    """
    with contextlib.suppress(DataError):
        import_torchvision()  # transformers imports it where it is installed, broken or not
    try:
        import transformers
    except ImportError as error:
        raise DataError(f"models of transformers need it installed ({error}): pip install 'hvdtrain[hf]'") from error
    library: Any = transformers
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a directory or a name on the hub; its own code runs only if that is trusted.

    Raises:
        DataError: there is none.
    """
    check_files(source)
    library = import_transformers()
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a tokenizer's files make its code raise
        else_give = "give --data.tokenizer" if is_model(source) else "name a model, or give --data.tokenizer"
        raise DataError(f"no tokenizer comes from {source} ({why_not(source, error)}): {else_give}") from error
    check_template(tokenizer.chat_template, source)
    return tokenizer


def check_files(source: str) -> None:
    """Raise DataError where a directory's files are not what they should be; a name on the hub is left to its library.

    transformers opens whatever an index names, wherever that lies, and waits for ever at a pipe.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    for index in folder.glob("*.index*.json"):  # of safetensors, of torch's own files, of variants of either
        indexed_files(index)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            read_json(folder / name)
    for path in folder.iterdir():
        if not path.is_dir() and not path.is_file():
            raise DataError(f"{path} is a pipe, a device or a link to nothing: take it out of the model's directory")


def check_whole(source: str, model: nn.Module | None = None) -> None:
    """Raise DataError where adapters are no whole model: transformers would put them into their base in silence.

    Args:
        source: directory or name on the hub.
        model: what came from it, if it was loaded.
    """
    if (Path(source) / ADAPTER_CONFIG).is_file() or hasattr(model, "peft_config"):
        raise DataError(f"{source} holds adapters, not a whole model: export them with --merged, and begin with that")


def is_model(source: str) -> bool:
    """Return whether a directory of this machine holds what transformers calls a model."""
    return (Path(source) / "config.json").is_file()


def why_not(source: str, error: Exception) -> str:
    """Return why nothing could be loaded from a directory or a name on the hub, of which its library tells the half."""
    folder = Path(source)
    if is_model(source):
        return why(error)
    if (folder / CHECKPOINTS).is_dir():
        return f"it is a run's directory: python -m hvdtrain export {source} writes a model to {folder / 'export'}"
    if folder.exists():
        return "it is no model of transformers: there is no config.json in it" if folder.is_dir() else "it is a file"
    return f"there is no such directory; as a name on the hub: {why(error)}"


def why(error: Exception) -> str:
    """Return what a person should know of an error that a model's files have made."""
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own: read it, and run it with --model.trust-remote-code"
    return describe(error)


def load_model(
    path: str | None, config: Path | None, attention: str, seed: int, trust_remote_code: bool = False
) -> nn.Module:
    """Return a causal language model in fp32, ready to be trained.

    Args:
        path: directory or name of a model to begin with; None for one with new weights.
        config: its config.json, if there is no path.
        attention: "sdpa" or "eager", or "auto" for what transformers chooses.
        seed: of new weights.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        DataError: there is none, or transformers has no such attention for it.
    """
    library = import_transformers()
    trust = {"trust_remote_code": trust_remote_code}
    how: dict[str, Any] = {"dtype": torch.float32, **trust}
    if attention != "auto":
        how["attn_implementation"] = attention
    try:
        if path is not None:
            check_files(path)
            check_whole(path)
            model = library.AutoModelForCausalLM.from_pretrained(path, **how)
            check_whole(path, model)
        else:
            settings = library.AutoConfig.from_pretrained(config, **trust)
            torch.manual_seed(seed)
            model = library.AutoModelForCausalLM.from_config(settings, **how)
    except DataError:
        raise
    except Exception as error:  # whatever a model's files make its code raise
        reason = why(error) if path is None else why_not(path, error)
        raise DataError(f"no model comes from {path or config} ({reason})") from error
    for settings in _configurations(model):
        settings.use_cache = False
    trained: nn.Module = model.train()
    return trained


def attention_of(model: nn.Module) -> str:
    """Return how the model computes attention: sdpa or eager."""
    settings: Any = model.config
    return str(getattr(settings.get_text_config(), "_attn_implementation", None) or "eager")


def check_length(model: nn.Module, length: int) -> None:
    """Raise ConfigError where a sample is longer than what the model was made for."""
    settings: Any = model.config
    longest = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ConfigError(
            f"--data.sequence-length {length} is more than the {longest} positions of the model: give"
            f" --data.sequence-length {longest}, or less"
        )


def num_rows(model: nn.Module) -> int:
    """Return the tokens that the model has embeddings for."""
    whole: Any = model
    return int(whole.get_input_embeddings().weight.shape[0])


def fit_embeddings(model: nn.Module, num_tokens: int, largest: int, may_resize: bool) -> str:
    """Give each token of the tokenizer an embedding, if asked to and if it has none; returns what a person should know.

    New rows are the mean of the old ones, of the output embeddings too; tied weights stay tied.

    Args:
        model: of transformers.
        num_tokens: those of the tokenizer.
        largest: the largest token in the documents.
        may_resize: add rows where there are too few.

    Raises:
        DataError: a token of the documents has no embedding, and none may be added.
    """
    rows = num_rows(model)
    if may_resize and num_tokens > rows:
        _resize(model, num_tokens)
        return f"embeddings: {num_tokens - rows} new rows, the mean of the {rows:,} old ones"
    if largest >= rows:
        raise DataError(
            f"the documents hold token {largest}, and the model has embeddings for {rows}: give --data.tokenizer the"
            " one that the model was made for, or add rows with --model.resize-embeddings"
        )
    if num_tokens > rows:
        return (
            f"embeddings: {num_tokens - rows} of the tokenizer's tokens have none, and none of them is in the documents"
        )
    return ""


def _resize(model: nn.Module, num_tokens: int) -> None:
    whole: Any = model
    rows = num_rows(model)
    whole.resize_token_embeddings(num_tokens, mean_resizing=False)
    layers = [layer for layer in (whole.get_input_embeddings(), whole.get_output_embeddings()) if layer is not None]
    with torch.no_grad():
        for layer in layers:
            for parameter in (layer.weight, getattr(layer, "bias", None)):
                if parameter is not None and len(parameter) == num_tokens:
                    parameter[rows:] = parameter[:rows].mean(0)


def write_model_files(folder: Path, model: nn.Module, tokenizer: Any) -> None:
    """Write all that `from_pretrained` needs besides the weights."""
    saved: Any = model
    kept = saved.config
    saved.config = copy.deepcopy(kept)
    try:
        for settings in _configurations(model):
            settings.use_cache = True  # off while it trains
        saved.config.save_pretrained(folder)
    finally:
        saved.config = kept
    if saved.can_generate():
        saved.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def identity(tokenizer: Any) -> list[Any]:
    """Return what makes two tokenizers the same."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = inner.to_str() if inner is not None else sorted(tokenizer.get_vocab().items())
    return [vocabulary, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]


def _configurations(model: nn.Module) -> list[Any]:
    """Return the model's configuration, and that of its text part where it has several."""
    settings: Any = model.config
    return list({id(part): part for part in (settings, settings.get_text_config())}.values())
