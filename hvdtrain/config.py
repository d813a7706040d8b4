"""Settings: frozen dataclasses, and their way to and from plain dictionaries. Standard library only.

Each field's docstring becomes its `--help`. Values are checked in `__post_init__`, which never rewrites them; derived
values are properties or functions. `None` always means "not given".
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from hvdtrain.errors import ConfigError
from hvdtrain.stop import parse_duration

Precision = Literal["fp32", "bf16", "fp16", "bf16-true", "fp64"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how large, how exact."""

    steps: int | None = None
    """Optimizer steps of the whole run. Give this or --train.epochs."""
    epochs: float | None = None
    """Passes over the training data, converted to steps at the start. Give this or --train.steps."""
    global_batch_size: int | None = None
    """Samples per optimizer step over all ranks. Any two of the three batch settings fix the third."""
    micro_batch_size: int | None = None
    """Samples that one rank puts through the model at a time."""
    accum_steps: int | None = None
    """Micro-batches that a rank accumulates before each optimizer step."""
    max_time: str | None = None
    """Wall-clock budget, such as 3h50m: then save and exit with code 75. Leave time for the save. None: no limit."""
    seed: int = 0
    """Seed of the initial weights, the order of the samples and every other random number."""
    precision: Precision = "fp32"
    """fp32, bf16 or fp16 (both by autocast; fp16 with a loss scaler), bf16-true (the weights too), fp64 for proofs."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient's Euclidean norm to this. None: no clipping."""

    @property
    def max_time_s(self) -> float | None:
        """Return the wall-clock budget in seconds."""
        return None if self.max_time is None else parse_duration(self.max_time)

    def __post_init__(self) -> None:
        if self.max_time is not None:
            parse_duration(self.max_time)
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("give --train.steps or --train.epochs, not both")
        for name in ("steps", "epochs", "global_batch_size", "micro_batch_size", "accum_steps", "max_grad_norm"):
            _check(self, name, lambda value: value > 0, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = "adamw"
    """adamw: decoupled weight decay (arXiv:1711.05101). sgd: with momentum if --optim.momentum is given. muon: for the
    hidden layers' matrices, adamw for the rest. Or a class of torch.optim, such as NAdam, with its own defaults."""
    peak_lr: float = 1e-3
    """Learning rate at the end of the warm-up, for a global batch of --optim.reference-batch if there is a rule."""
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    """Scale the learning rate with the global batch: linear (arXiv:1706.02677, section 2.1) or by its square root."""
    reference_batch: int | None = None
    """Global batch in samples that --optim.peak-lr is meant for; needed by --optim.lr-rule."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """What follows the warm-up; wsd: constant, then a linear decay over the last --optim.decay-fraction."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0 to the peak."""
    final_lr_fraction: float = 0.1
    """Learning rate at the end of the schedule, as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Share of all steps over which wsd decays."""
    weight_decay: float = 0.1
    """Applied to matrices only; vectors (norms, biases) are never decayed."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the denominator."""
    momentum: float = 0.0
    """SGD: momentum."""
    kernel: Literal["fused", "foreach", "loop"] = "fused"
    """AdamW: one kernel for all weights, several, or one for each."""

    def __post_init__(self) -> None:
        _check(self, "peak_lr", lambda value: value > 0, "must be greater than 0")
        _check(self, "decay_fraction", lambda value: 0 < value <= 1, "must be above 0 and at most 1")
        for name in ("warmup_steps", "weight_decay"):
            _check(self, name, lambda value: value >= 0, "must not be negative")
        for name in ("beta1", "beta2", "momentum"):
            _check(self, name, lambda value: 0 <= value < 1, "must be at least 0 and below 1")
        _check(self, "reference_batch", lambda value: value > 0, "must be greater than 0")
        if self.lr_rule != "none" and self.reference_batch is None:
            raise ConfigError(
                f"lr_rule = {self.lr_rule} needs reference_batch, the global batch that peak_lr is meant for"
            )
        _check(self, "final_lr_fraction", lambda value: 0 <= value <= 1, "must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """What travels between the ranks."""

    compression: Literal["none", "fp16"] = "none"
    """Format of gradients on the wire. fp16 halves the bytes and rounds each gradient to 11 bits."""
    bucket_mib: int = 25
    """Gradients travel in parts of this size (the first of 1 MiB), each as soon as backward has finished it."""
    op: Literal["average", "adasum"] = "average"
    """adasum combines gradients by their directions (arXiv:2006.02924); MPI and 2, 4, 8, ... ranks only."""

    def __post_init__(self) -> None:
        _check(self, "bucket_mib", lambda value: value > 0, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down, and how often."""

    every: int = 20
    """Steps between two lines of metrics."""
    tensorboard: bool = False
    """Also write TensorBoard event files to RUN_DIR/tensorboard."""

    def __post_init__(self) -> None:
        _check(self, "every", lambda value: value > 0, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the held-out data."""

    every: int | None = None
    """Steps between two evaluations; there is always one at the end. None: only that one."""
    batch_size: int | None = None
    """Samples that one rank evaluates at a time. None: the micro-batch size."""
    choices: Path | None = None
    """Language models: .jsonl file of questions, {"context": ..., "choices": [...], "answer": 0}, to answer as well."""

    def __post_init__(self) -> None:
        for name in ("every", "batch_size"):
            _check(self, name, lambda value: value > 0, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving, to be able to continue."""

    every: int | None = None
    """Steps between two checkpoints; there is always one at the end. None: only that one."""
    keep_last: int | None = 3
    """How many of the newest to keep. None: all. The best by held-out loss is always kept."""
    keep_every: int | None = None
    """Besides those, keep what was saved at multiples of this step. None: nothing."""

    def __post_init__(self) -> None:
        for name in ("every", "keep_last", "keep_every"):
            _check(self, name, lambda value: value > 0, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When to give up."""

    stall_limit: str = "5m"
    """End the job with the stacks of all ranks when none gets on for this long, or one gives no sign of life."""
    max_skipped_steps: int = 20
    """Steps in a row that may be skipped because the loss or the gradient is not finite."""
    replica_check_every: int | None = 100
    """Steps between two checks, also made before each save, that all ranks hold the same weights. None: never."""
    noise_scale: bool = False
    """Log the gradient noise scale in samples (arXiv:1812.06162), and how far the gradients of several ranks agree."""
    memory_check: bool = True
    """Before training with more than 64 MiB of weights, compare what it will need with the memory that is free."""

    @property
    def stall_limit_s(self) -> float:
        """Return the limit in seconds."""
        return parse_duration(self.stall_limit)

    def __post_init__(self) -> None:
        if self.stall_limit_s < 1:
            raise ConfigError(f"stall_limit = {self.stall_limit} must be at least 1s")
        for name in ("max_skipped_steps", "replica_check_every"):
            _check(self, name, lambda value: value > 0, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What can be done with any model."""

    sync_batch_norm: bool = False
    """Batch normalisation over the samples of all ranks instead of each rank's own."""
    compile: Literal["none", "model", "blocks"] = "none"
    """torch.compile: the whole model, or each block (part of an nn.ModuleList), whose gradients then leave earlier."""
    linear: Literal["auto", "torch", "onednn"] = "auto"
    """Library of linear layers' fp32 products on CPUs. auto: oneDNN on x86 CPUs that are not Intel's, where it is
    faster, else torch's own choice."""
    checkpoint_blocks: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them: less memory, more time."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings that every recipe shares; a recipe adds its own sections."""

    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class BatchPlan:
    """`micro_batch_size x accum_steps x world_size = global_batch_size`, settled."""

    global_batch_size: int
    micro_batch_size: int
    accum_steps: int
    world_size: int

    def __str__(self) -> str:
        return (
            f"{self.micro_batch_size} samples x {self.accum_steps} accumulation x {self.world_size}"
            f" rank{'' if self.world_size == 1 else 's'}"
            f" = global batch {self.global_batch_size}"
        )


def plan_batch(train: TrainConfig, world_size: int) -> BatchPlan:
    """Settle the batch arithmetic: any two of the three settings fix the third; alone, the global batch is not split.

    Raises:
        ConfigError: the numbers do not divide or do not agree; the message names numbers that would.
    """
    total, micro, accum = train.global_batch_size, train.micro_batch_size, train.accum_steps
    if total is None:
        if micro is None:
            raise ConfigError("give --train.global-batch-size or --train.micro-batch-size")
        accum = accum or 1
        return BatchPlan(micro * accum * world_size, micro, accum, world_size)
    if micro is not None and accum is not None and micro * accum * world_size != total:
        raise ConfigError(
            f"--train.micro-batch-size {micro} x --train.accum-steps {accum} x {world_size} ranks"
            f" = {micro * accum * world_size}, not --train.global-batch-size {total}: leave one of the three out"
        )
    name, given = ("micro-batch-size", micro) if micro is not None else ("accum-steps", accum or 1)
    unit = given * world_size
    if total % unit:
        split = f" with --train.{name} {given}" if given > 1 else ""
        raise ConfigError(
            f"the global batch of {total} samples does not divide among {world_size} ranks{split}:"
            f" set --train.global-batch-size to a multiple of {unit}, such as {_multiples_beside(total, unit)}"
        )
    other = total // unit
    micro, accum = (given, other) if micro is not None else (other, given)
    return BatchPlan(total, micro, accum, world_size)


def keep_batch(train: TrainConfig, world_size: int, total: int, largest_micro: int) -> BatchPlan:
    """Split the global batch of a run that goes on, on another number of ranks than before.

    A micro-batch is as large as memory is known to hold, or as `train` asks for; accumulation does the rest.

    Raises:
        ConfigError: it does not divide among the ranks; the message names numbers of ranks that would do.
    """
    if total % world_size:
        fits = [n for n in range(1, total + 1) if total % n == 0]
        near = sorted(sorted(fits, key=lambda n: abs(n - world_size))[:4])
        raise ConfigError(
            f"the run's global batch of {total} samples does not divide among {world_size} ranks:"
            f" go on with {', '.join(map(str, near[:-1]))} or {near[-1]}"
        )
    share = total // world_size
    limit = train.micro_batch_size or largest_micro
    micro = max(n for n in range(1, min(limit, share) + 1) if share % n == 0)
    return BatchPlan(total, micro, share // micro, world_size)


def _multiples_beside(total: int, unit: int) -> str:
    below, above = total // unit * unit, (total // unit + 1) * unit
    return f"{below} or {above}" if below else str(above)


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a configuration into nested plain values that TOML can hold; `None` is left out."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is None:
            continue
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        result[item.name] = value
    return result


def merge(config: T, values: Mapping[str, Any], source: str = "the configuration", prefix: str = "") -> T:
    """Return `config` with `values` (nested, as from TOML) in place of its own.

    Args:
        config: a dataclass instance, the defaults.
        values: what to replace; dashes in keys count as underscores.
        source: where the values come from, for messages.
        prefix: the section that `config` is, for messages.

    Raises:
        ConfigError: an unknown key (names the nearest real one) or a value of the wrong type.
    """
    hints = typing.get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for given, value in values.items():
        key = given.replace("-", "_")
        if key not in hints:
            raise ConfigError(f"{source}: there is no setting '{prefix}{given}'{nearest(key, hints, prefix)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{source}: '{prefix}{given}' is a section: write [{prefix}{given}] above its settings"
                )
            changes[key] = merge(current, value, source, f"{prefix}{given}.")
        else:
            changes[key] = _convert(value, hints[key], f"{source}: '{prefix}{given}'")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def nearest(word: str, known: typing.Iterable[str], prefix: str = "") -> str:
    """Say `; did you mean '...'?` for the known word most like `word`, or name them all."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{prefix}{close[0]}'?"
    return f"; known are {', '.join(known)}"


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check a plain value against a field's type; an int serves as a float, a string as a path."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        return _convert(value, kinds[0], where)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{where} is {value!r}, but must be one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, typing.get_args(hint)[0], where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if origin is None and type(value) is not hint:
        raise ConfigError(f"{where} is {value!r}, but must be of type {hint.__name__}")
    return value


def _check(config: Any, name: str, holds: typing.Callable[[Any], bool], rule: str) -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise ConfigError(f"{name} = {value} {rule}")
