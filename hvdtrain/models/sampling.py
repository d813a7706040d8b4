"""Text from a language model: draw the next token, append it, repeat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_tokens: Sequence[int],
    num_tokens: int,
    *,
    context_length: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Continue a prompt and return the new tokens. The model's training mode is left as it was.

    Each token costs a forward pass over the last `context_length` tokens. Random numbers come from a generator of
    their own on the CPU: the same seed draws the same numbers on any device and disturbs no one else's.

    Args:
        model: maps tokens, int64 `(1, T)`, to logits `(1, T, V)`.
        prompt_tokens: at least one token.
        num_tokens: tokens to add.
        context_length: the most tokens the model is shown, the newest ones.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw among the k likeliest tokens only. None: among all.
        seed: of the random draws.

    Raises:
        ConfigError: an empty prompt, or a setting out of range.
    """
    _check(prompt_tokens, num_tokens, context_length, temperature, top_k)
    device = next(model.parameters()).device
    generator = torch.Generator(device="cpu").manual_seed(seed)
    tokens = list(prompt_tokens)
    was_training = model.training
    model.eval()
    try:
        for _ in range(num_tokens):
            context = torch.tensor([tokens[-context_length:]], dtype=torch.int64, device=device)
            logits = model(context)[0, -1].double().cpu()
            tokens.append(_draw(logits, temperature, top_k, generator))
    finally:
        model.train(was_training)
    return tokens[len(prompt_tokens) :]


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Draw a token from logits `(V,)`."""
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(len(logits) if top_k is None else min(top_k, len(logits)))
    choice = torch.multinomial((values / temperature).softmax(dim=0), num_samples=1, generator=generator)
    return int(tokens[choice])


def _check(
    prompt_tokens: Sequence[int], num_tokens: int, context_length: int, temperature: float, top_k: int | None
) -> None:
    if not prompt_tokens:
        raise ConfigError("the prompt is empty: give at least one token to continue")
    if num_tokens < 0:
        raise ConfigError(f"num_tokens = {num_tokens} must not be negative")
    if context_length < 1:
        raise ConfigError(f"context_length = {context_length} must be greater than 0")
    if temperature < 0:
        raise ConfigError(f"temperature = {temperature} must not be negative; 0 takes the likeliest token")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k = {top_k} must be greater than 0; leave it out to draw among all tokens")
