"""The sections of settings that every recipe shares.

Each field's docstring becomes its `--help`. Ranges stand in the fields (`setting`) and are checked when a section is
made, which never rewrites a value; derived values are properties or functions. `None` always means "not given".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.settings.comm import CommConfig
from hvdtrain.settings.fields import Section, check_fields, setting
from hvdtrain.settings.log import LogConfig
from hvdtrain.settings.profiling import ProfileConfig
from hvdtrain.settings.units import parse_duration

# Schedules that multiply the rate now and then.
_FALLING = ("step", "multistep", "plateau")

Precision = Literal["auto", "fp32", "bf16", "fp16", "bf16-true", "fp64", "tf32"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How long, how large, how exact."""

    steps: int | None = setting(None, above=0, maximum=10**12, changeable=True)
    """Optimizer steps of the whole run. Give this or --train.epochs."""
    epochs: float | None = setting(None, above=0, maximum=1e6, changeable=True)
    """Passes over the training data, converted to steps at the start. Give this or --train.steps."""
    global_batch_size: int | None = setting(None, above=0, maximum=10**12, changeable=True)
    """Samples per optimizer step over all ranks. Any two of the three batch settings fix the third."""
    micro_batch_size: int | None = setting(None, above=0, maximum=10**12, changeable=True)
    """Samples that one rank puts through the model at a time."""
    accum_steps: int | None = setting(None, above=0, maximum=10**12, changeable=True)
    """Micro-batches that a rank accumulates before each optimizer step."""
    max_time: str | None = setting(None, changeable=True)
    """Wall-clock budget since the launcher was started, such as 3h50m: then save and exit with code 75. Leave time for
    the save. None: no limit."""
    seed: int = setting(0, minimum=0)
    """Seed of the initial weights, the order of the samples and every other random number."""
    precision: Precision = "fp32"
    """fp32, bf16 or fp16 (both by autocast; fp16 with a loss scaler), bf16-true (the weights too), fp64 for proofs.
    tf32: fp32 whose products round their factors to 11 bits, on NVIDIA GPUs since the A100; fp32 never does that.
    auto: bf16 where the devices of all ranks are fast in it (avx512_bf16, AMX, GPUs that have it), else fp32."""
    deterministic: bool = setting(False, changeable=True)
    """Two runs alike on GPUs, too, bit by bit: torch, cuBLAS and NCCL take algorithms that repeat, which are slower;
    what has none ends the run by its name. On CPUs runs repeat without it."""
    max_grad_norm: float | None = setting(1.0, above=0)
    """Clip the global gradient's Euclidean norm to this. None: no clipping."""
    ema: float | None = setting(None, minimum=0, below=1)
    """Decay of a moving average of the weights, such as 0.999, that is evaluated and exported. None: no average."""

    @property
    def max_time_s(self) -> float | None:
        """Return the wall-clock budget in seconds."""
        return None if self.max_time is None else parse_duration(self.max_time)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_time is not None:
            parse_duration(self.max_time)
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("give --train.steps or --train.epochs, not both")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """The optimizer and its learning-rate schedule: what all optimizers share.

    Each optimizer has a class of its own in optim/; this one stands for it where only what is shared is given.
    """

    name: str = "adamw"
    """adamw: decoupled weight decay (arXiv:1711.05101). sgd: with momentum if --optim.momentum is given. muon: for the
    hidden layers' matrices, adamw for the rest. lars, lamb: a rate for each layer, for large batches. Or a class of
    torch.optim, such as NAdam, with its own defaults."""
    peak_lr: float = setting(1e-3, above=0)
    """Learning rate at the end of the warm-up, for a global batch of --optim.reference-batch if there is a rule."""
    lr_rule: Literal["none", "linear", "sqrt"] = "none"
    """Scale the learning rate with the global batch: linear (arXiv:1706.02677, section 2.1) or by its square root."""
    reference_batch: int | None = setting(None, above=0)
    """Global batch in samples that --optim.peak-lr is meant for; needed by --optim.lr-rule."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "step", "multistep", "plateau"] = "cosine"
    """What follows the warm-up. wsd: constant, then a linear decay over the last --optim.decay-fraction. step,
    multistep and plateau multiply the rate by --optim.decay-factor: at every --optim.step-fraction of the run, at each
    of --optim.milestones, or after --optim.patience evaluations without a lower held-out loss."""
    warmup_steps: int | None = setting(None, minimum=0)
    """Steps of linear warm-up from 0 to the peak. None: --optim.warmup-fraction of the run."""
    warmup_fraction: float = setting(0.0, minimum=0, below=1)
    """Share of all steps that is warm-up, where --optim.warmup-steps is not given."""
    final_lr_fraction: float = setting(0.1, minimum=0, maximum=1)
    """Learning rate at the end of the schedule, as a fraction of the peak."""
    decay_fraction: float = setting(0.2, above=0, maximum=1)
    """Share of all steps over which wsd decays."""
    decay_factor: float = setting(0.1, above=0, below=1)
    """By what step, multistep and plateau multiply the learning rate each time."""
    step_fraction: float = setting(1 / 3, above=0, below=1)
    """Share of all steps after which step multiplies, again and again."""
    milestones: tuple[float, ...] = setting((1 / 3, 2 / 3, 8 / 9), above=0, below=1)
    """Shares of all steps after which multistep multiplies; these are epochs 30, 60 and 80 of 90."""
    patience: int = setting(5, above=0, maximum=10**6)
    """Evaluations (--eval.every) without a lower held-out loss after which plateau multiplies."""
    weight_decay: float = setting(0.1, minimum=0)
    """Applied to matrices only; vectors (norms, biases) are never decayed."""
    shard: bool = setting(False, changeable=True, several_ranks=True)
    """Spread the optimizer's state over the ranks, each moving its part of the weights (ZeRO-1, arXiv:1910.02054):
    AdamW's takes a quarter on 4 ranks. Checkpoints load with and without it, on any number of ranks."""
    offload: Literal["none", "cpu"] = setting("none", changeable=True)
    """cpu: keep the optimizer's state in host memory where the model is on a GPU, and take it there a part at a time in
    each step. Less memory on the GPU, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_rule != "none" and self.reference_batch is None:
            raise ConfigError(
                f"lr_rule = {self.lr_rule} needs reference_batch, the global batch that peak_lr is meant for"
            )

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what the rule and the schedule do not use."""
        if self.warmup_steps is not None:
            yield "warmup_fraction", f"--optim.warmup-steps {self.warmup_steps} says how long the warm-up is"
        if self.lr_rule == "none":
            yield "reference_batch", "give --optim.lr-rule linear or sqrt, which scales the learning rate by it"
        if self.schedule != "wsd":
            yield "decay_fraction", f"it belongs to --optim.schedule wsd, and the schedule is {self.schedule}"
        if self.schedule == "constant":
            yield "final_lr_fraction", "--optim.schedule constant never leaves the peak"
        if self.schedule in _FALLING:
            yield "final_lr_fraction", f"--optim.schedule {self.schedule} multiplies by --optim.decay-factor"
        else:
            yield "decay_factor", f"it is for the schedules {', '.join(_FALLING)}, and the schedule is {self.schedule}"
        owners = {"step": "step_fraction", "multistep": "milestones", "plateau": "patience"}
        for schedule, name in owners.items():
            if self.schedule != schedule:
                yield name, f"it belongs to --optim.schedule {schedule}, and the schedule is {self.schedule}"


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    """Evaluation on the held-out data."""

    every: int | str | None = setting(None, above=0, changeable=True, interval="training")
    """Steps between two evaluations, or 1epoch, 0.5epoch; there is always one at the end. None: only that one."""
    batch_size: int | None = setting(None, above=0, changeable=True)
    """Samples that one rank evaluates at a time. None: the micro-batch size."""
    patience: int | None = setting(None, above=0, changeable=True)
    """End the run after this many evaluations without a lower held-out loss. None: never."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what counts evaluations where there is only the last."""
        if self.every is None:
            yield "patience", "there is one evaluation only, at the end: give --eval.every"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Saving, to be able to continue."""

    every: int | str | None = setting(None, above=0, changeable=True, interval="training")
    """Steps between two checkpoints, or 1epoch; there is always one at the end, and one of the best evaluation. None:
    only those."""
    keep_last: int | None = setting(3, above=0, changeable=True)
    """How many of the newest to keep. None: all. The best by held-out loss is always kept."""
    keep_every: int | None = setting(None, above=0, changeable=True)
    """Besides those, keep what was saved at multiples of this step. None: nothing."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what chooses among checkpoints where all are kept."""
        if self.keep_last is None:
            yield "keep_every", "without --checkpoint.keep-last every checkpoint is kept"


@dataclass(frozen=True, kw_only=True)
class HealthConfig(Section):
    """When to give up."""

    stall_limit: str = setting("5m", changeable=True)
    """End the job with the stacks of all ranks when none makes progress for this long, or one gives no sign of life."""
    max_skipped_steps: int = setting(20, above=0, changeable=True)
    """Steps in a row that may be skipped because the loss or the gradient is not finite."""
    spikes: Literal["off", "warn", "skip", "stop"] = setting("warn", changeable=True)
    """Where a gradient's norm is far above those of the last steps, or the mean loss above those of the last lines:
    warn; also skip the steps of such gradients; or skip and stop."""
    slow_rank: float | None = setting(1.3, above=1, changeable=True, several_ranks=True)
    """Name a rank, once, whose own part of a step takes so many times as long as the others' for long. None: never."""
    replica_check_every: int | None = setting(100, above=0, changeable=True, several_ranks=True)
    """Steps between two checks, also made before each save, that all ranks hold the same weights. None: never."""
    noise_scale: bool = setting(False, changeable=True)
    """Log the gradient noise scale in samples (arXiv:1812.06162), and how far the gradients of several ranks agree."""
    memory_check: bool = setting(True, changeable=True)
    """Before training with more than 64 MiB of weights, compare what it will need with the memory that is free."""

    @property
    def stall_limit_s(self) -> float:
        """Return the limit in seconds."""
        return parse_duration(self.stall_limit)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stall_limit_s < 1:
            raise ConfigError(f"stall_limit = {self.stall_limit} must be at least 1s")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """What can be done with any model."""

    sync_batch_norm: bool = setting(False, several_ranks=True)
    """Batch normalisation over the samples of all ranks instead of each rank's own."""
    compile: Literal["none", "auto", "model", "blocks"] = setting("none", changeable=True)
    """torch.compile: the whole model, or each block (part of an nn.ModuleList), whose gradients then leave earlier.
    auto: the blocks, on GPUs since the A100 where Triton and a C compiler are there; nothing elsewhere."""
    linear: Literal["auto", "torch", "onednn"] = setting("auto", changeable=True)
    """Library of products on CPUs, of linear layers in fp32 and of attention in bf16. auto: oneDNN where it is faster:
    for linear layers on CPUs with AVX-512 that are not Intel's, for attention on those that multiply bf16."""
    checkpoint_blocks: bool = setting(False, changeable=True)
    """Compute each block's activations again in the backward pass instead of keeping them: less memory, more time."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """How data is read; a recipe adds what it reads."""

    workers: int = setting(0, minimum=0, maximum=256, changeable=True)
    """Processes of each rank that read batches, where decoding or augmenting takes long. 0: the rank itself reads."""
    ahead: int | None = setting(None, minimum=0, changeable=True)
    """Batches that are read before they are needed. None: two a worker; without workers, one where the data allows,
    none of data in memory."""


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
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_fields(self)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield each setting that has no effect with the others as they are, and what it is for."""
        for item in dataclasses.fields(self):
            section = getattr(self, item.name)
            if isinstance(section, Section):
                yield from ((f"{item.name}.{name}", reason) for name, reason in section.unused())
        if self.model.linear == "onednn" and self.train.precision not in ("fp32", "auto", "bf16", "bf16-true"):
            yield "model.linear", f"it is about fp32 and bf16, and --train.precision is {self.train.precision}"
