"""The settings of the native decoder. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.settings import ModelConfig, setting

SHAPE = (
    *("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "rope_theta", "norm_eps"),
    "tie_embeddings",
)
"""The settings that say what a decoder computes from its weights."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """The size and shape of the decoder. The size of the vocabulary comes from the tokenizer."""

    num_layers: int = setting(6, above=0, maximum=10_000)
    """Transformer blocks."""
    hidden_size: int = setting(256, above=0, maximum=2**20)
    """Width of the residual stream."""
    num_heads: int = setting(4, above=0, maximum=2**16)
    """Query heads of each attention; each has hidden-size / num-heads channels."""
    num_kv_heads: int | None = setting(None, above=0, maximum=2**16)
    """Key and value heads, each shared by a group of query heads. None: as many as query heads."""
    intermediate_size: int | None = setting(None, above=0, maximum=2**24)
    """Inner width of the feed-forward layers. None: 8/3 of the hidden size, rounded up to a multiple of 64."""
    rope_theta: float = setting(10000.0, above=0)
    """Base of the rotary wavelengths, which run from 2 pi to about 2 pi theta tokens."""
    norm_eps: float = setting(1e-5, minimum=0)
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: bool = True
    """One matrix embeds the tokens and predicts them."""
    init_embeddings: Literal["random", "bigrams"] = "random"
    """How embeddings and output layer begin. random: drawn from N(0, 0.02^2), as all matrices are. bigrams: fitted to
    how often tokens of the training text follow each other, so that training begins where counting ends; two matrices
    are needed, --model.tie-embeddings false."""
    residual_dtype: Literal["fp32", "products"] = "fp32"
    """Type of the residual stream, which the blocks add to. products: that of the matrix products, with
    --train.precision bf16 or fp16 in 16 bits: fewer bytes, and each block's sum is rounded."""
    init_from: Path | None = setting(None, path="directory")
    """Begin with the weights in this directory, of a LlamaForCausalLM or an export; the model's shape comes from it."""
    loss_chunk: int | None = setting(None, above=0, changeable=True)
    """Positions whose logits exist at a time when the loss is computed. None: as many as take 256 MiB in fp32,
    on large GPUs a thirty-second part of their memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_embeddings == "bigrams" and self.tie_embeddings and self.init_from is None:
            raise ConfigError(
                "model.init_embeddings = bigrams needs two matrices, as one cannot say which token follows which:"
                " give --model.tie-embeddings false, or --model.init-embeddings random"
            )
        unit = 2 * self.num_heads  # rotary positions turn pairs of channels
        if self.hidden_size % unit:
            above = -(-self.hidden_size // unit) * unit
            raise ConfigError(
                f"hidden_size = {self.hidden_size} must give each of {self.num_heads} heads an even number of channels:"
                f" set it to a multiple of {unit}, such as {above}"
            )
        if self.num_heads % self.kv_heads:
            fits = ", ".join(str(n) for n in range(1, self.num_heads + 1) if self.num_heads % n == 0)
            raise ConfigError(
                f"num_heads = {self.num_heads} does not divide into num_kv_heads = {self.kv_heads} equal groups:"
                f" set num_kv_heads to one of {fits}"
            )

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield the shape, and how weights begin, where they come from the model to begin with."""
        yield from super().unused()
        if self.init_from is not None:
            yield from (
                (name, f"the model in --model.init-from {self.init_from} has a shape of its own") for name in SHAPE
            )
            yield "init_embeddings", f"the weights come from --model.init-from {self.init_from}"

    @property
    def head_size(self) -> int:
        """Return D, the channels of one head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Return K, the key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def feed_forward_size(self) -> int:
        """Return the inner width of the feed-forward layers."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64
