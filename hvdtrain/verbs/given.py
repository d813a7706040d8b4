"""Settings that the user gave, in a file or by name, before they are merged into a recipe's."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.trainer import Recipe


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def names_in_train(values: Mapping[str, Any]) -> set[str]:
    """Return the names in the section [train] of nested settings; it may be something else by mistake."""
    section = values.get("train")
    return set(section) if isinstance(section, Mapping) else set()


def leave_batch_open(recipe: Recipe, given: Iterable[str]) -> Recipe:
    """Drop the recipe's own global batch size where `given`, names of [train], has the two settings that fix it."""
    names = {name.replace("-", "_") for name in given}
    if {"micro_batch_size", "accum_steps"} <= names and "global_batch_size" not in names:
        return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, global_batch_size=None))
    return recipe
