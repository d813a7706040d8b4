"""What is trained (`Task`), and the settings that build it (`Recipe`): neither needs torch before that."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hvdtrain.errors import ConfigError, DataError
from hvdtrain.optim.table import build_optimizer
from hvdtrain.process.arguments import misfit
from hvdtrain.settings import Config
from hvdtrain.settings.units import in_units

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from typing_extensions import Self

    from hvdtrain.data.samplers import Sampler
    from hvdtrain.settings import OptimConfig

Batch = Any
"""What a data set's `batch` returns: tensors in tuples, lists and dictionaries, as deep as one likes."""


_REDUCTIONS = ("sum", "mean")
_NO_MEMORY = "DefaultCPUAllocator"  # in what torch says, of no type of its own, where host memory is at its end


def _check_kinds(part: Any) -> None:
    """Raise ConfigError where a field of a task, or of a part of one, is of another kind than it says.

    A text in place of a tuple of texts, or a word that nobody knows, would mean something else in silence.
    """
    name = type(part).__name__
    for item in fields(part):
        value, kind = getattr(part, item.name), str(item.type)
        if item.name == "reduction" and value not in _REDUCTIONS:
            raise ConfigError(f"{name}(reduction={value!r}) must be {' or '.join(map(repr, _REDUCTIONS))}")
        if kind.startswith("tuple[") and not isinstance(value, tuple | list):
            raise ConfigError(
                f"{name}({item.name}=...) takes a tuple or a list, not an object of type {type(value).__name__}: write"
                f" {name}({item.name}=[...])"
            )
        if kind.startswith("Callable[") and not callable(value) and value is not None:
            raise ConfigError(f"{name}({item.name}=...) takes a function, not an object of type {type(value).__name__}")
        if kind == "nn.Module":
            _check_model(value)
        if isinstance(value, type) and item.name == "build_optimizer":
            raise ConfigError(
                f"{name}(build_optimizer=...) takes a function of the settings and the model, not a class: write"
                f" build_optimizer=lambda optim, model: {value.__name__}(model.parameters(), lr=optim.peak_lr)"
            )
        if kind == "str" and not isinstance(value, str):
            raise ConfigError(f"{name}({item.name}={value!r}) must be a text")
        if kind.startswith("Callable[") and value is not None:
            _check_takes(f"{name}({item.name}=...)", value, kind)


def _check_takes(where: str, function: Any, kind: str) -> None:
    """Raise ConfigError where a function does not take the arguments that its field's kind says it is given."""
    given = re.match(r"Callable\[\[(.*?)\], ", kind)
    # A type with brackets of its own is one argument.
    kinds = re.sub(r"\[[^]]*\]", "", given[1]).split(", ") if given else []
    written = misfit(function, len(kinds)) if given else ""
    if written:
        takes = f"{len(kinds)} argument{'s' * (len(kinds) > 1)} ({', '.join(kinds)})"
        raise ConfigError(f"{where} is called with {takes}, and {written} takes others: write a function of these")


def _adapt(part: Any, names: tuple[str, ...]) -> None:
    """Have fields hold users' data as `Dataset`s, in a task or a part of one that is being made.

    Raises:
        DataError: data that cannot be read, or a `collate` that nothing would call; names the field.
    """
    kind, given = type(part).__name__, [getattr(part, name) for name in names]
    for name in names:
        object.__setattr__(part, name, _data_of(part, name))
    if part.collate is not None and all(getattr(part, name) is data for name, data in zip(names, given, strict=True)):
        raise DataError(
            f"{kind}(collate=...) would never be called: {type(given[0]).__name__} makes its batches itself, by a"
            " method batch; leave collate out, or give the samples one by one (__getitem__ and __len__)"
        )
    object.__setattr__(part, "collate", None)


def _data_of(part: Any, name: str) -> Any:
    """Return users' data as a `Dataset`; an error names the field that holds it."""
    from hvdtrain.data.users import as_dataset  # a recipe's settings are read before torch is there

    data, kind = getattr(part, name), type(part).__name__
    if data is None:
        raise DataError(
            f"{kind}({name}=None): there is no data; who has none to hold out keeps a part of the rest, as by"
            " torch.utils.data.random_split"
        )
    try:
        return as_dataset(data, part.collate)
    except DataError as error:
        raise DataError(f"{kind}({name}=...): {error}") from error


def _check_model(model: Any) -> None:
    from torch import nn

    from hvdtrain.models.walk import first_lazy

    if isinstance(model, nn.Module):
        lazy = first_lazy(model)
        if lazy:
            raise ConfigError(f"Task(model=...): {lazy} has no shape yet: run the model once, on one batch, in build()")
        return
    if isinstance(model, type):
        raise ConfigError(f"Task(model=...) holds a class: make an object, {model.__name__}(...)")
    raise ConfigError(f"Task(model=...) takes a torch.nn.Module, not an object of type {type(model).__name__}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Something to be evaluated beside the held-out data."""

    name: str = ""
    """Stands before its metrics: `val/<name>/loss`. Needed where its metrics have the names of others."""
    data: Any
    """As `Task.val_data`."""
    loss_sums: Callable[[nn.Module, Batch], dict[str, Tensor]]
    """Returns, for one batch on the model's device, a *sum* over its targets for each name in `metrics`."""
    metrics: tuple[str, ...]
    reduction: Literal["sum", "mean"] = "sum"
    """As `Task.reduction`."""
    collate: Callable[[list[Any]], Any] | None = None
    """As `Task.collate`, which is for `train_data` and `val_data` alone."""

    def __post_init__(self) -> None:
        """Adapt users' own data sets."""
        _check_kinds(self)
        _adapt(self, ("data",))


@dataclass(frozen=True, kw_only=True)
class CorpusEvaluation:
    """Figures of a whole held-out set that are no means over its samples, such as BLEU or a word error rate.

    The answers to all samples are gathered from all ranks, each once and in the order of the data, so that the figures
    are those of one process.
    """

    name: str = ""
    """Stands before its metrics: `val/<name>/bleu`. Needed where its metrics have the names of others."""
    data: Any
    """As `Task.val_data`."""
    answers: Callable[[nn.Module, Batch], list[Any]]
    """Returns, for one batch on the model's device, one answer for each sample in it: a text, or other plain values.
    The model is in evaluation mode, without gradients; nothing is drawn at random."""
    score: Callable[[list[Any]], dict[str, float]]
    """Returns the figures by name, given the answers to all samples of `data` in their order. Called on rank 0."""
    metrics: tuple[str, ...]
    """Names of the figures that `score` returns."""
    collate: Callable[[list[Any]], Any] | None = None
    """As `Task.collate`, which is for `train_data` and `val_data` alone."""

    def __post_init__(self) -> None:
        """Adapt users' own data sets."""
        _check_kinds(self)
        _adapt(self, ("data",))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: a model, its data and its loss."""

    model: nn.Module
    """On the CPU, built from the seed."""
    train_data: Any
    """hvdtrain's own kind of data set (`Dataset`), a map-style one of torch or of one's own (`__getitem__` and
    `__len__`), or a stream that can be iterated."""
    val_data: Any
    """The held-out data, likewise; a stream must have a length."""
    collate: Callable[[list[Any]], Any] | None = None
    """Makes a batch of a list of samples of a map-style data set or a stream. None: torch's `default_collate`."""
    sampler: Sampler | None = None
    """Which sample stands where in an epoch: `Shuffled()`, `InOrder()`, `Weighted(weights)`, or a class of one's own
    (`hvdtrain.data.samplers.Sampler`). None: shuffled; a stream has its own order."""
    drop_last: bool = False
    """Leave out what is left of an epoch after its last full global batch."""
    loss_sums: Callable[[nn.Module, Batch], dict[str, Tensor]]
    """Returns, for one batch on the model's device, a *sum* over its targets for each name in `metrics`."""
    reduction: Literal["sum", "mean"] = "sum"
    """mean: `loss_sums` returns means over a batch's targets instead, as torch's losses do by themselves; each is
    weighted by the number of targets that the data set's `num_targets` counts (for most, samples), so that the loss is
    exactly the mean over the global batch on any number of ranks."""
    metrics: tuple[str, ...] = ("loss",)
    """Names of the sums that `loss_sums` returns; "loss" is the one that is minimised."""
    evaluations: tuple[Evaluation | CorpusEvaluation, ...] = ()
    """What is evaluated besides `val_data`."""
    unit: str = "samples"
    """What a target is, in the plural: "samples" or "tokens"."""
    summarize: Callable[[dict[str, float]], dict[str, float]] = lambda means: means
    """Derives further figures from the evaluated means, such as bits per byte."""
    epilogue: Callable[[nn.Module, dict[str, float]], str] = lambda model, metrics: ""
    """Called on rank 0 after the last evaluation: what a person should read at the end. No collectives."""
    write_model_files: Callable[[Path], None] = lambda folder: None
    """Writes to RUN_DIR/model what a reader of the weights needs: config.json and the tokenizer, as transformers does.
    Called on rank 0 when training begins."""
    description: str = ""
    """What a person should read at the start about model and data."""
    fingerprint: str = ""
    """Changes when the data does; a run goes on only with the data it began with."""
    build_optimizer: Callable[[OptimConfig, nn.Module], torch.optim.Optimizer] = build_optimizer
    """Returns the optimizer over the model's trainable parameters. One of your own takes from the settings what it
    needs; its learning rate is set before every step, in all groups, as the settings' schedule says."""
    samples: Callable[[nn.Module, dict[str, float]], dict[str, Any]] = lambda model, metrics: {}
    """Returns what trackers show of the model beside its figures: texts, and images, uint8 `(height, width, 3)`, by
    name. Called on rank 0 after each evaluation, in evaluation mode and without gradients, where a sink shows them. No
    collectives."""
    sinks: tuple[Any, ...] | list[Any] = ()
    """Where metrics go besides the run directory, on rank 0: objects with `begin`, `write` and `close`, as
    `rundir.sinks.Sink` has them, and perhaps `show`. Each is called in a thread of its own; one that fails, or takes
    too long, is told and left out."""
    callbacks: tuple[Any, ...] | list[Any] = ()
    """Objects with any of the methods of `Callback`: `after_step(run)`, `after_evaluation(run, metrics)`, and
    `state_dict` and `load_state_dict` for what a run that goes on needs."""
    components: tuple[Any, ...] = ()
    """What else takes part in every step: classes derived from `trainer.component.Component`, or functions, each of
    which is given the job and returns a component."""

    def __post_init__(self) -> None:
        """Adapt users' own data sets.

        Raises:
            DataError: they cannot be read.
            ConfigError: another field holds something else than it is for.
        """
        from hvdtrain.data.samplers import check_kind

        _check_kinds(self)
        check_kind(self.sampler)
        _adapt(self, ("train_data", "val_data"))
        if getattr(self.val_data, "is_endless", False):
            raise DataError("the held-out stream must say how many samples it has: give it a method __len__")


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """Settings that know how to build their task. Derive from it, frozen and keyword-only, and add sections."""

    def build(self, say: Callable[[str], None]) -> Task:
        """Return the task, alike on every rank and without collectives; `say` tells a person what takes long.

        Raises:
            UsageError: data is missing, or settings do not fit it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method build(say) that returns a Task")

    def resolve(self) -> Self:
        """Return the settings with those filled in that others decide, such as the shape of a model that is loaded.

        Raises:
            UsageError: what they name cannot be read.
        """
        return self


def build_task(recipe: Recipe, say: Callable[[str], None]) -> Task:
    """Return the task that a recipe builds, alike on every rank and at every start.

    What `build` draws without a seed of its own is that of `--train.seed`. The caller's generators stay as they are.

    Raises:
        UsageError: data is missing, settings do not fit it, or there is no memory for what is built.
    """
    import torch

    from hvdtrain.data.draws import kept_random_state, seed_numpy_and_python

    with kept_random_state():
        torch.manual_seed(recipe.train.seed)
        seed_numpy_and_python(recipe.train.seed)
        try:
            return recipe.build(say)
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or _NO_MEMORY in str(error)):
                raise
            asked = re.search(r"allocate ([0-9]+) bytes", str(error))
            what = f", {in_units(int(asked[1]))} at once" if asked else ""
            raise ConfigError(
                f"what the recipe builds takes more memory than there is{what}: make the model smaller, or read less"
                " data into memory"
            ) from error
