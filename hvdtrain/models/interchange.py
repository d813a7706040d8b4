"""The native decoder as a `LlamaForCausalLM` directory of transformers, and back. Needs no transformers.

    config.json               the shape of the model, in transformers' names
    model.safetensors         weights; or several files and model.safetensors.index.json
    tokenizer.json, tokenizer_config.json

Parameters have the same names, shapes and meaning in both, so that weights pass one to one.
"""

from __future__ import annotations

import json
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
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rotary positions of type {kind}")
    heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
    if values.get("head_dim") not in (None, hidden // heads):
        problems.append(f"head_dim = {values['head_dim']}, which is not hidden_size / num_attention_heads")
    if problems:
        raise DataError(f"the native decoder cannot be the model in {folder}: {'; '.join(problems)}")
    config = DecoderConfig(
        num_layers=int(values["num_hidden_layers"]),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=int(values.get("num_key_value_heads") or heads),
        intermediate_size=int(values["intermediate_size"]),
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    )
    end = values.get("eos_token_id")
    return Shape(
        config,
        int(values["vocab_size"]),
        int(values.get("max_position_embeddings", 2048)),
        values.get("bos_token_id"),
        end[0] if isinstance(end, list) else end,
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights in `folder`, one file or several; a tied matrix comes once.

    Raises:
        DataError: they are not there, or damaged.
    """
    index = folder / "model.safetensors.index.json"
    names = _listed_files(index) if index.exists() else ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"the weights {folder / name} cannot be read: there is no such file")
        try:
            weights.update(safetensors.torch.load_file(folder / name))
        except (OSError, SafetensorError) as error:
            raise DataError(f"the weights {folder / name} cannot be read: {error}") from error
    return weights


def _listed_files(index: Path) -> list[str]:
    """Return the files that an index names. They lie beside it: it may come from a stranger.

    Raises:
        DataError: it is no index, or names something elsewhere.
    """
    named = read_json(index).get("weight_map")
    names: list[Any] = list(named.values()) if isinstance(named, dict) else [None]
    wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name or "\0" in name]
    if wrong:
        raise DataError(f"{index} names {wrong[0]!r}, which is no file beside it")
    return sorted(set(names))


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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: it is not there, or something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no JSON object")
    return values
