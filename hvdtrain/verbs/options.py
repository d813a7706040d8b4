"""What each verb is asked besides the settings of a recipe. Standard library only; docstrings become `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdtrain.errors import ConfigError


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


@dataclass(frozen=True, kw_only=True)
class BenchOptions(RecipeOptions):
    """`bench RECIPE`."""

    steps: int = 5
    """Optimizer steps of a measurement."""
    rounds: int = 5
    """Measurements of each variant; they take turns."""
    warmup: int = 3
    """Steps of each variant before the first measurement."""
    knobs: bool = True
    """Also measure with one setting changed each: compile, precision, buckets, wire format and others."""
    json: Path | None = None
    """Also write what was measured to this file."""

    def __post_init__(self) -> None:
        for name in ("steps", "rounds", "warmup"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RecipeOptions):
    """`plan RECIPE`."""

    to: int | None = None
    """The most workers to predict. None: four times those at hand, at least 8."""
    network: str | None = None
    """Another network between hosts than the one at hand: rate and one-way latency, such as 25gbit,5us."""
    ranks_per_host: int | None = None
    """Ranks of a host, for --network. None: as measured."""
    price: float | None = None
    """Of a worker and hour, in any currency."""
    output: Path | None = None
    """Also write plan.json and plan.html to this directory."""
    noise_steps: int = 100
    """Steps that are trained to measure the gradient noise scale in the second half of them; 0: it is not measured."""
    noise_from: Path | None = None
    """Directory of a training run with --health.noise-scale: its noise scale, over all of it, is used."""
    from_: Path | None = None
    """Answer from a plan.json, or a directory with one, instead of measuring; if the directory is that of a run with
    --health.noise-scale, with what it has logged."""

    def __post_init__(self) -> None:
        for name in ("to", "ranks_per_host"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be greater than 0")
        if self.price is not None and self.price < 0:
            raise ConfigError(f"--price {self.price:g} must not be negative")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Look at the machine, the ranks and the network, and say what to mend. Exit code 1 where something is wrong."""

    json: Path | None = None
    """Also write the findings, and the facts of every rank, to this file."""
    run_dir: Path = Path("runs")
    """Directory of a run, or where runs go: its disk is looked at."""
    timeout: float = 60.0
    """Seconds to wait for the other ranks before they are given up."""

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ConfigError(f"--timeout {self.timeout:g} must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a run's model as a directory that transformers, and whatever reads its format, can load."""

    run_dir: Path
    """Directory of a run."""
    checkpoint: str = "latest"
    """latest, best (by held-out loss), or a step."""
    output: Path | None = None
    """Directory to write; None: RUN_DIR/export."""
    dtype: Literal["as-trained", "float32", "bfloat16", "float16"] = "as-trained"
    """Type of the weights."""
    overwrite: bool = False
    """Replace an earlier export in --output."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue prompts with a language model that was trained by the recipe lm."""

    run_dir: Path
    """Directory of a run, or one that was exported."""
    checkpoint: str = "latest"
    """latest, best (by held-out loss), or a step; for a run."""
    prompt: tuple[str, ...] = ()
    """Text to continue; several are continued together. None: standard input, or the beginning of a document."""
    max_tokens: int = 200
    """The most tokens to add to each prompt."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw among the k likeliest tokens only."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have at least this probability."""
    seed: int = 0
    """Of the random draws."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not printed."""
    cache: bool = True
    """Keep the keys and values of tokens that were read; without, it takes longer and says the same."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"--max-tokens {self.max_tokens} must be greater than 0")
