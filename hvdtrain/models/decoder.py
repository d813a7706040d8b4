"""The native language model: a decoder with RMSNorm, rotary positions, SwiGLU and grouped-query attention.

Shapes: B samples, T tokens of a sample, C = hidden_size, H query heads, K key/value heads, D = C / H, V = vocab_size.

Parameters have the names, shapes and meaning of transformers' `LlamaForCausalLM`, so weights pass between the two
one to one (with tied embeddings, transformers stores `lm_head.weight` under `model.embed_tokens.weight` alone).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdtrain.models import one_token
from hvdtrain.models.cache import Cache, LayerCache
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.documents import Bounds, attend
from hvdtrain.models.elementwise import RMSNorm, rotary_tables, rotate
from hvdtrain.models.linear import product_dtype, product_of, products
from hvdtrain.models.loss import chunked_loss, is_by_chunks, next_token_loss, positions_at_once

_INIT_STD = 0.02


class Decoder(nn.Module):
    """A decoder-only transformer that predicts the next token.

    There is no dropout: a language model rarely sees its data often enough to need it, and without random numbers in
    the forward pass a step is the same function of its samples on any number of ranks.

    The weights depend on `seed` alone, not on the device, the data type or the global random number generator.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.model = _Body(config, vocab_size)
        self.lm_head = _Linear(config.hidden_size, vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.init_weights(seed)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        seen: Tensor | Bounds | None = None,
    ) -> Tensor:
        """Map tokens, int64 `(B, T)`, to logits `(B, T, V)`; position t sees tokens 0 to t and predicts token t + 1.

        Given targets, int64 `(B, T)`, return their summed cross entropy in nats instead; then, where the vocabulary is
        large, the logits never exist all at once. Given a cache, the tokens follow those that it holds, and are put
        into it. Given `seen`, bool `(B, 1, T, T)`, position t sees the tokens j with `seen[b, 0, t, j]` and no others;
        or, given the bounds of documents, those before it in its own.
        """
        if cache is not None and cache.length and tokens.shape[1] == 1 and targets is None and one_token.suits(self):
            return self._one_token(cache)(tokens)[:, None]
        hidden = self.model(tokens, cache, seen)
        if targets is not None:
            chunk = self.config.loss_chunk or positions_at_once(self.vocab_size, hidden.device)
            if is_by_chunks(targets.numel(), self.vocab_size, hidden.device, chunk):
                return chunked_loss(hidden, self.lm_head.weight, targets, chunk, product_of(self.lm_head))
        logits: Tensor = self.lm_head(hidden)
        return logits if targets is None else next_token_loss(logits, targets)[0]

    def new_cache(self, padding: Tensor, max_length: int, reuse: Cache | None = None) -> Cache:
        """Return an empty cache for rows that begin with `padding`, int64 `(B,)`, tokens that are not to be seen.

        One that is no longer needed, for as many rows and tokens, is emptied and used again: with the same weights.
        """
        if reuse is None:
            return Cache(self.config, padding, max_length, like=self.lm_head.weight)
        reuse.padding, reuse.length = padding, 0
        if reuse.one_token is not None:
            reuse.one_token.forget()
        return reuse

    def _one_token(self, cache: Cache) -> one_token.OneToken:
        if cache.one_token is None:
            weight = self.lm_head.weight
            positions = torch.arange(cache.max_length, device=weight.device)
            rope = rotary_tables(positions, self.config.head_size, self.config.rope_theta, like=weight)
            cache.one_token = one_token.OneToken(self, cache, rope)
        return cache.one_token

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all matrices from N(0, 0.02^2) and set the norms to 1.

        The two projections of a block that write to the residual stream are scaled by 1 / sqrt(2 num_layers), so that
        the stream's variance does not grow with depth (Radford et al. 2019, "Language Models are Unsupervised
        Multitask Learners", section 2.3).
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)
        residual_std = _INIT_STD / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():  # a tied matrix comes once
            if parameter.is_meta:  # its shape alone is wanted
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else _INIT_STD
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            parameter.copy_(values.normal_(0.0, std, generator=generator))

    def num_parameters(self) -> int:
        """Return the number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


class _Body(nn.Module):
    """Everything below the logits: embeddings, blocks and the final norm."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, tokens: Tensor, cache: Cache | None = None, seen: Tensor | Bounds | None = None) -> Tensor:
        """Map tokens, int64 `(B, T)`, to hidden states `(B, T, C)`."""
        x: Tensor = self.embed_tokens(tokens)
        if self.config.residual_dtype == "products":
            x = x.to(product_dtype(x))
        length = tokens.shape[1]
        positions = torch.arange(length, device=x.device) if cache is None else cache.begin(length)
        rope = rotary_tables(positions, self.config.head_size, self.config.rope_theta, like=x)
        for i, block in enumerate(self.layers):
            x = block(x, rope, seen) if cache is None else block(x, rope, cache.mask, cache.layers[i])
        normed: Tensor = self.norm(x)
        return normed


class _Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = _FeedForward(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        seen: Tensor | Bounds | None = None,
        past: LayerCache | None = None,
    ) -> Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        x = x + self.self_attn(self.input_layernorm(x), rope, seen, past)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Attention(nn.Module):
    """Causal grouped-query attention (arXiv:2305.13245)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        C, D = config.hidden_size, config.head_size
        self.head_size = D
        self.is_grouped = config.kv_heads != config.num_heads
        self.q_proj = _Linear(C, config.num_heads * D)
        self.k_proj = _Linear(C, config.kv_heads * D)
        self.v_proj = _Linear(C, config.kv_heads * D)
        self.o_proj = _Linear(config.num_heads * D, C)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        seen: Tensor | Bounds | None = None,
        past: LayerCache | None = None,
    ) -> Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        parts = products(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (torch.unflatten(part, -1, (-1, self.head_size)) for part in parts)  # (B, T, H or K, D)
        q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = past.extend(k, v)
        if isinstance(seen, Bounds):
            y = attend(q.to(v.dtype), k.to(v.dtype), v, seen)  # (B, H, T, D)
        else:
            is_grouped = self.is_grouped
            if is_grouped and seen is not None and x.is_cuda:
                k, v, is_grouped = *one_a_query_head(k, v, q.shape[1]), False
            y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, enable_gqa=is_grouped)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


def one_a_query_head(keys: Tensor, values: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return keys and values, `(B, K, T, D)`, repeated to `(B, H, T, D)`.

    With a mask, the only kernel for GPUs that takes groups keeps all T x T products of each head.
    """
    times = num_heads // keys.shape[1]
    return keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)


class _FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = _Linear(config.hidden_size, config.feed_forward_size)
        self.up_proj = _Linear(config.hidden_size, config.feed_forward_size)
        self.down_proj = _Linear(config.feed_forward_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        gate, up = products(x, self.gate_proj, self.up_proj)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class _Linear(nn.Linear):
    """A linear map without bias that draws no initial weights: `Decoder.init_weights` does."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Leave the weights, and the global random number generator, alone."""


class _Embedding(nn.Embedding):
    """An embedding that draws no initial weights: `Decoder.init_weights` does."""

    def reset_parameters(self) -> None:
        """Leave the weights, and the global random number generator, alone."""
