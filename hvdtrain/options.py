"""What each verb is asked besides the settings of a recipe. Standard library only; docstrings become `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """What every verb that takes a recipe is asked."""

    config: Path | None = None
    """TOML file of settings; flags win over it."""
    print_config: bool = False
    """Print the resolved settings as TOML, and stop."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RecipeOptions):
    """`train RECIPE`."""

    run_dir: Path | None = None
    """Directory of this run; goes on from its newest checkpoint. Default: a new one under runs/."""
    dry_run: bool = False
    """Print what would be trained, and stop."""
    allow_config_change: tuple[str, ...] = ()
    """Settings, such as optim.peak-lr, that may differ from those that the run in --run-dir was begun with."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(RecipeOptions):
    """`verify RECIPE`."""

    steps: int = 3
    """Optimizer steps of each comparison."""
    json: Path | None = None
    """Also write the table to this file."""
