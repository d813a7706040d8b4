"""The native decoder as a `LlamaForCausalLM` directory of transformers, and back. Needs no transformers.

    config.json               the shape of the model, in transformers' names
    model.safetensors         weights; or several files and model.safetensors.index.json
    tokenizer.json, tokenizer_config.json

Parameters have the same names, shapes and meaning in both, so that weights pass one to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from hvdtrain.errors import DataError
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.settings.untrusted import file_in, read_json

# What a config.json may say at most: more than any model has, and less than what fills memory by a slip of the pen.
_LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "vocab_size": 1 << 26,
    "max_position_embeddings": 1 << 30,
}
# What transformers' Llama can do and the native decoder cannot, and the values that mean "no".
_UNSUPPORTED = {"attention_bias": (False, None), "mlp_bias": (False, None), "hidden_act": ("silu",)}


@dataclass(frozen=True)
class Shape:
    """What a `config.json` says of a model."""

    config: DecoderConfig
    vocab_size: int
    max_length: int
    """The most tokens that it was made for."""
    begin: int | None = None
    """Token that every text begins with."""
    end: int | None = None
    """Token that ends a text."""


def to_llama(config: DecoderConfig, vocab_size: int, max_length: int, end_of_text: int | None) -> dict[str, Any]:
    """Return the `config.json` of a decoder.

    Args:
        config: its shape.
        vocab_size: V.
        max_length: the most tokens that it was trained on at a time.
        end_of_text: the token between documents, None where nobody knows.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.feed_forward_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "use_cache": True,
    }


def read_shape(folder: Path) -> Shape:
    """Read the `config.json` in `folder`.

    Raises:
        DataError: there is none, or the native decoder cannot be that model; names what it cannot.
    """
    values = read_json(folder / "config.json")
    if values.get("model_type") != "llama":
        raise DataError(
            f"{folder} holds a model of type {values.get('model_type')!r}, the native decoder is 'llama':"
            " the recipe hf trains any model of transformers"
        )
    problems = [f"{k} = {values[k]}" for k, allowed in _UNSUPPORTED.items() if k in values and values[k] not in allowed]
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise DataError(f"{folder / 'config.json'}: rope_parameters is no object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rotary positions of type {kind}")
    heads, hidden = _whole(values, "num_attention_heads", folder), _whole(values, "hidden_size", folder)
    if values.get("head_dim") not in (None, hidden // heads):
        problems.append(f"head_dim = {values['head_dim']}, which is not hidden_size / num_attention_heads")
    if problems:
        raise DataError(f"the native decoder cannot be the model in {folder}: {'; '.join(problems)}")
    config = DecoderConfig(
        num_layers=_whole(values, "num_hidden_layers", folder),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=_whole({"num_key_value_heads": heads, **_without_none(values)}, "num_key_value_heads", folder),
        intermediate_size=_whole(values, "intermediate_size", folder),
        rope_theta=_real({**values, **_without_none(rope)}, "rope_theta", 10000.0, folder),
        norm_eps=_real(values, "rms_norm_eps", 1e-6, folder, may_be_zero=True),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    )
    vocab_size = _whole(values, "vocab_size", folder)
    end = values.get("eos_token_id")
    shape = Shape(
        config,
        vocab_size,
        _whole({"max_position_embeddings": 2048, **values}, "max_position_embeddings", folder),
        _token(values.get("bos_token_id"), vocab_size),
        _token(end[0] if isinstance(end, list) and end else end, vocab_size),
    )
    files = list(folder.glob("*.safetensors"))
    if files:
        check_size(shape, sum(file.stat().st_size for file in files), folder)
    return shape


def check_size(shape: Shape, held: int, folder: Path) -> None:
    """Raise DataError where a config.json describes more parameters than there are weights, before memory is taken.

    Args:
        shape: what the config.json says.
        held: numbers, or bytes, that the weights hold.
        folder: where it lies, for the message.
    """
    config = shape.config
    attention = config.hidden_size * (config.num_heads + config.kv_heads) * 2 * config.head_size
    layer = attention + 3 * config.hidden_size * config.feed_forward_size
    needed = config.num_layers * layer + shape.vocab_size * config.hidden_size
    if needed > held:
        raise DataError(
            f"{folder / 'config.json'} describes a model of {needed:,} parameters, and its weights hold no more than"
            f" {held:,}: they do not belong together"
        )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _whole(values: dict[str, Any], name: str, folder: Path) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST[name]:
        raise DataError(f"{folder / 'config.json'}: {name} = {str(value)[:80]}; it must be 1 to {_LARGEST[name]:,}")
    return value


def _real(values: dict[str, Any], name: str, default: float, folder: Path, may_be_zero: bool = False) -> float:
    value = values.get(name)
    value = default if value is None else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value < 1e30 or (may_be_zero and value == 0)):
        wanted = "that is not negative" if may_be_zero else "above 0"
        raise DataError(f"{folder / 'config.json'}: {name} = {str(value)[:80]}; it must be a number {wanted}")
    return float(value)


def _token(value: object, vocab_size: int) -> int | None:
    """Return a token's number, None for what is none."""
    is_token = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
    return value if is_token and isinstance(value, int) else None


def read_weights(folder: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    """Read the weights in `folder`, one file of this name or several; a tied matrix comes once.

    Raises:
        DataError: they are not there, or damaged.
    """
    index = folder / f"{name}.index.json"
    files = indexed_files(index) if index.exists() else [file_in(folder, name)]
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(safetensors.torch.load_file(file))
        except (OSError, SafetensorError) as error:
            raise DataError(f"the weights {file} cannot be read: {error}") from error
    return weights


def indexed_files(index: Path) -> list[Path]:
    """Return the files that an index of weights, such as `model.safetensors.index.json`, names.

    Raises:
        DataError: it is no index, or names what is not a file beside it.
    """
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise DataError(f"{index} has no 'weight_map' of file names")
    return [file_in(index.parent, name) for name in sorted(set(named.values()))]


def load_decoder(model: Decoder, folder: Path) -> None:
    """Copy the weights in `folder` into a decoder.

    Raises:
        DataError: they are not there, damaged, or of another shape; names the first that does not fit.
    """
    weights = {name: w for name, w in read_weights(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    own = dict(model.named_parameters())  # a tied matrix comes once, by its first name
    if model.config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if wrong:
        raise DataError(f"the weights in {folder} do not fit its config.json: see {', '.join(wrong[:3])}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
