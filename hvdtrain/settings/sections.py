"""The sections of settings that every recipe shares.

Each field's docstring becomes its `--help`. Values are checked in `__post_init__`, which never rewrites them; derived
values are properties or functions. `None` always means "not given".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.settings.units import parse_duration
from hvdtrain.settings.values import check

Precision = Literal["fp32", "bf16", "fp16", "bf16-true", "fp64"]


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
            check(self, name, lambda value: value > 0, "must be greater than 0")


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
        check(self, "peak_lr", lambda value: value > 0, "must be greater than 0")
        check(self, "decay_fraction", lambda value: 0 < value <= 1, "must be above 0 and at most 1")
        for name in ("warmup_steps", "weight_decay"):
            check(self, name, lambda value: value >= 0, "must not be negative")
        for name in ("beta1", "beta2", "momentum"):
            check(self, name, lambda value: 0 <= value < 1, "must be at least 0 and below 1")
        check(self, "reference_batch", lambda value: value > 0, "must be greater than 0")
        if self.lr_rule != "none" and self.reference_batch is None:
            raise ConfigError(
                f"lr_rule = {self.lr_rule} needs reference_batch, the global batch that peak_lr is meant for"
            )
        check(self, "final_lr_fraction", lambda value: 0 <= value <= 1, "must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """What travels between the ranks."""

    compression: Literal["none", "fp16", "bf16"] = "none"
    """Format of gradients on the wire. fp16 halves the bytes and rounds each gradient to 11 bits; bf16 halves them too,
    and rounds to 8 bits with the range of fp32."""
    bucket_mib: int = 25
    """Gradients travel in parts of this size (the first of 1 MiB), each as soon as backward has finished it."""
    op: Literal["average", "adasum"] = "average"
    """adasum combines gradients by their directions (arXiv:2006.02924); MPI and 2, 4, 8, ... ranks only."""

    def __post_init__(self) -> None:
        check(self, "bucket_mib", lambda value: value > 0, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down, and how often."""

    every: int = 20
    """Steps between two lines of metrics."""
    tensorboard: bool = False
    """Also write TensorBoard event files to RUN_DIR/tensorboard."""

    def __post_init__(self) -> None:
        check(self, "every", lambda value: value > 0, "must be greater than 0")


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
            check(self, name, lambda value: value > 0, "must be greater than 0")


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
            check(self, name, lambda value: value > 0, "must be greater than 0")


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
            check(self, name, lambda value: value > 0, "must be greater than 0")


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
