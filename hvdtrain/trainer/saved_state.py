"""What a checkpoint holds besides the weights: gathered, or a part of each rank; and how it is given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hvdtrain.data.fingerprint import Fingerprint
from hvdtrain.errors import ConfigError
from hvdtrain.models.weights import extra_state, load_model_weights, shapes_of
from hvdtrain.rundir.manifest import Manifest
from hvdtrain.settings import to_dict
from hvdtrain.trainer.changed_options import with_options
from hvdtrain.trainer.component import Component, nested_tensors
from hvdtrain.trainer.fits import check_fits
from hvdtrain.trainer.formats import upgraded
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.odd_state import check_kinds, check_like, in_a_sentence
from hvdtrain.trainer.strategy import optimizer_tensors
from hvdtrain.trainer.values import storable
from hvdtrain.world import World

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training

# States of this size are gathered on rank 0 in no time; larger ones are written by their own ranks.
_SMALL_BYTES = 1 << 20
# An optimizer's state of this size, which all ranks have, is worth to be shared out where a GPU's must be copied.
_SHARED_BYTES = 64 << 20


def training_state(job: Job, training: Training) -> dict[str, Any]:
    """Return all but the weights, as `state.pt` holds it; what is whole on rank 0 alone may be less on others.

    Collective.
    """
    components = _replicated_states(training)
    for name, state in own_states(training).items():
        if job.world.size == 1:  # whoever saves copies all together, and need not wait for a GPU
            components[name] = [storable(state, f"the state of '{name}'")]
            continue
        on_host = storable(state, f"the state of '{name}'", lambda tensor: tensor.detach().cpu())
        components[name] = job.world.all_gather_object(on_host, f"save.{name}")
    return _state(job, training, training.strategy.optimizer_state(job.world, training), components)


def divided_state(job: Job, training: Training) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `state.pt` holds where all ranks write, and this rank's part; nothing is sent.

    The first is alike on all ranks but for an optimizer that is each rank's own.
    """
    outline, pieces = training.strategy.divided_optimizer_state(job.world, training)
    part = {"rank": job.world.rank, "step": training.step, "optimizer": pieces, "components": own_states(training)}
    return _state(job, training, outline, _replicated_states(training)), part


def is_large(job: Job, training: Training) -> bool:
    """Tell whether what ranks have for themselves is too much to be gathered at each save. Collective."""
    if job.world.size == 1:
        return False
    if training.strategy.divides_state:
        return True
    own = sum(tensor.nbytes for tensor in nested_tensors(own_states(training)).values())
    if training.strategy.shares_copies(job.world):
        own += sum(tensor.nbytes for tensor in optimizer_tensors(training).values()) // _SHARED_BYTES * _SHARED_BYTES
    return job.world.all_reduce(float(own), "max", "save.own") > _SMALL_BYTES


def _state(job: Job, training: Training, optimizer: Mapping[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    exported = training.evaluated_component()
    return {
        "step": training.step,
        "is_evaluation_due": training.is_evaluation_due,
        "num_steps": job.num_steps,
        "best_loss": training.best_loss,
        "optimizer": optimizer,
        "extra_state": extra_state(training.model),
        "components": components,
        "exported": exported and {"component": exported.name, "about": exported.about},
        "config": to_dict(job.config),
        "global_batch_size": job.plan.global_batch_size,
        "fingerprint": job.task.fingerprint,
        "data": training.data,
    }


def _replicated_states(training: Training) -> dict[str, Any]:
    """Return the states of components that are alike on all ranks and have any, by name."""
    states = {item.name: item.state_dict() for item in training.components if item.is_replicated}
    return {name: state for name, state in states.items() if state}


def own_states(training: Training) -> dict[str, Any]:
    """Return this rank's states of components that differ between ranks and have any, by name."""
    states = {item.name: item.state_dict() for item in training.components if not item.is_replicated}
    return {name: state for name, state in states.items() if state}


def check_storable(training: Training) -> None:
    """Make sure, after a first step, that a checkpoint can hold what that has left: before it, there may be none.

    Raises:
        ConfigError: it cannot; says what it is of.
    """
    for name, shape in shapes_of(training.model).items():
        before = training.structure.shapes.get(name)
        if before != shape:
            was = "was not there" if before is None else f"was {before}"
            raise ConfigError(
                f"{name} of the model is {shape} after the first step, and {was} before: a run could not go on, as it"
                " begins with what build() makes. Register it there in its full shape, or leave it out of the state"
                " (persistent=False)"
            )
    storable(extra_state(training.model), "the model's state_dict()")
    for entries in training.optimizer.state.values():
        storable(entries, "the optimizer's state")
    for component in training.components:
        if not type(component).__module__.startswith("hvdtrain."):
            storable(component.state_dict(), f"the state of '{component.name}'")


def read_latest(job: Job, model: nn.Module, data: dict[str, Fingerprint]) -> dict[str, Any] | None:
    """Load the newest checkpoint's weights into `model` and return the rest of it; None where there is none."""
    checkpoint = job.run.load_newest(job.log.say) if job.directory is not None else None
    if checkpoint is None:
        return None
    state = checked_state(job, checkpoint.state, checkpoint.manifest, data)
    with in_a_sentence(job):
        load_model_weights(model, checkpoint.weights, state["extra_state"])
    return state


def checked_state(job: Job, state: dict[str, Any], manifest: Manifest, data: dict[str, Fingerprint]) -> dict[str, Any]:
    """Return a checkpoint's state as it would be saved today.

    Raises:
        ResumeError: it belongs to other settings or data, or is no such state.
    """
    with in_a_sentence(job):
        state = upgraded(state, manifest.format_version)
        check_kinds(state, manifest.step)
        check_fits(job, state, data)
    return state


def handed_out(world: World, components: Sequence[Component], found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what rank 0 has read, on every rank; of what ranks have for themselves, each its own. Collective.

    These may be as large as the model each, and no rank is sent another one's. Where another number of ranks has saved,
    all of them are: from these follows what each one goes on with.
    """
    apart: dict[str, list[Any]] = {}
    if found is not None:
        own = {component.name for component in components if not component.is_replicated}
        saved = found["components"]
        has_each = [name for name in own & saved.keys() if isinstance(saved[name], list)]
        apart = {name: saved.pop(name) for name in sorted(has_each) if len(saved[name]) == world.size}
    state, names = world.broadcast_object((found, list(apart)), "resume.state")
    if state is None:
        return None
    for name in names:
        kept: list[Any] = [None] * world.size
        kept[world.rank] = world.scatter_object(apart.get(name), f"resume.{name}")
        state["components"][name] = kept
    return state


def restore(job: Job, component: Component, states: Mapping[str, Any]) -> None:
    """Give a component its part of what was saved; one that was not there then begins anew."""
    saved = states.get(component.name)
    rank: int = job.world.rank
    of_ranks: list[Any] = saved if isinstance(saved, list) else [saved]
    if saved is not None and not (component.is_replicated and saved is of_ranks[0]):
        is_own = not component.is_replicated and len(of_ranks) == job.world.size
        saved = of_ranks[rank] if is_own else component.redistribute(of_ranks, rank)
    if saved is not None:
        check_like(component.state_dict(), saved, component.name)
        component.load_state_dict(saved)


def restore_optimizer(job: Job, training: Training, state: Any) -> None:
    """Load what a checkpoint has of the optimizer; None: it comes from rank 0."""
    if state is None:
        return
    with in_a_sentence(job):
        training.optimizer.load_state_dict(with_options(state, training.options))


def resting_tensors(training: Training) -> list[Tensor]:
    """Return what an update alone changes: parameters, and what the optimizer keeps of them."""
    return [*training.model.parameters(), *optimizer_tensors(training).values()]
