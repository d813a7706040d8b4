"""Where a model of transformers comes from."""

from __future__ import annotations

from pathlib import Path

from hvdtrain.errors import ConfigError


def check_one_origin(path: str | None, config: Path | None, is_needed: bool = False) -> None:
    """Raise ConfigError where both a model to begin with and a new one's configuration are given, or a needed one not.

    Args:
        path: `--model.path`.
        config: `--model.config`.
        is_needed: the recipe has no model of its own.
    """
    num_given = (path is not None) + (config is not None)
    if num_given > 1 or (is_needed and not num_given):
        raise ConfigError("give --model.path, a model to begin with, or --model.config, one to train from scratch")
