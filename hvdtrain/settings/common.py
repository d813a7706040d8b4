"""What most people set: short names of settings, and the ones that `--help` shows first."""

from __future__ import annotations

from collections.abc import Collection

# Short name -> the setting, or the first of these that a recipe has.
SHORT = {
    "steps": ("train.steps",),
    "epochs": ("train.epochs",),
    "batch_size": ("train.global_batch_size",),
    "lr": ("optim.peak_lr",),
    "seed": ("train.seed",),
    "precision": ("train.precision",),
    "max_time": ("train.max_time",),
    "data": ("data.path", "data.root"),
    "model": ("model.path", "model.name"),
    "workers": ("data.workers",),
}
COMMON = {
    *(setting for settings in SHORT.values() for setting in settings),
    *("train.micro_batch_size", "train.ema", "optim.name", "optim.warmup_steps", "optim.weight_decay"),
    *("data.val_path", "data.sequence_length", "data.dataset", "data.download"),
    *("data.synthetic", "data.image_size", "data.augment", "labels.smoothing"),
    *("model.num_layers", "model.hidden_size", "model.num_heads"),
    *("eval.every", "checkpoint.every", "log.every", "log.tensorboard", "comm.compression"),
}
"""The settings of `--help`; `--help-all` shows the others too."""


def full_name(name: str, known: Collection[str]) -> str:
    """Return the setting among `known` that a short name stands for; any other name as it is."""
    if name in known:
        return name
    return next((setting for setting in SHORT.get(name, ()) if setting in known), name)


def option_name(field: str) -> str:
    """Return how an option's flag is called: `from` of the field `from_`, `sweep.random` of `sweep__random`."""
    return field.rstrip("_").replace("__", ".")


def short_name(setting: str) -> str | None:
    """Return the short name of a setting, if it has one."""
    return next((short for short, settings in SHORT.items() if setting in settings), None)
