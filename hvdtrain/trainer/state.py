"""All that changes while training, and how it is set up; `saved_state` has what a checkpoint holds of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hvdtrain.data.fingerprint import Fingerprint
from hvdtrain.data.loader import Loader
from hvdtrain.data.order import EvaluationOrder
from hvdtrain.data.own_generators import generators_in
from hvdtrain.models.compilation import is_compiled
from hvdtrain.models.weights import check_can_be_saved, check_types, extra_state, model_weights
from hvdtrain.optim.orthogonal import multiply_in_bf16
from hvdtrain.trainer.changed_model import Structure
from hvdtrain.trainer.changed_options import Options, changed_options
from hvdtrain.trainer.component import Component, Step, acting, nested_tensors
from hvdtrain.trainer.components import build_components
from hvdtrain.trainer.contract import checked_optimizer
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.left_behind import dropped_lines
from hvdtrain.trainer.model import prepare_model
from hvdtrain.trainer.odd_state import in_a_sentence
from hvdtrain.trainer.peaks import product_type
from hvdtrain.trainer.randomness import MicroBatchRandomness
from hvdtrain.trainer.rank_figures import RankFigures
from hvdtrain.trainer.rates import GroupRates
from hvdtrain.trainer.same_data import compare_data
from hvdtrain.trainer.saved_state import handed_out, read_latest, restore, restore_optimizer
from hvdtrain.trainer.snapshot import Snapshot
from hvdtrain.trainer.strategy import Strategy
from hvdtrain.trainer.values import storable
from hvdtrain.world import World, WrappedOptimizer, has_synchronized_layers

C = TypeVar("C", bound=Component)


@dataclass
class Training:
    """Model, optimizer and components: what a step changes."""

    model: nn.Module
    """On its device, in its type."""
    optimizer: WrappedOptimizer
    """Over the model's trainable parameters; its gradients are averaged as the strategy has it."""
    rates: GroupRates
    """Sets the learning rates of its groups."""
    components: list[Component]
    """In the order in which they are called."""
    strategy: Strategy
    """Says whether the ranks are equal."""
    randomness: MicroBatchRandomness
    """Gives each sample its own random numbers."""
    reader: Loader
    """Reads this rank's micro-batches."""
    held_out: dict[tuple[str, EvaluationOrder], Loader] = field(default_factory=dict, init=False)
    """Readers of what is evaluated, by name and order: their processes stay from one evaluation to the next."""
    runs_in_step: bool
    """Ranks must put equally many micro-batches through the model, empty ones if need be."""
    data: dict[str, Fingerprint] = field(default_factory=dict)
    """What the data is known by; empty in a rehearsal."""
    step: int = 0
    """Optimizer steps completed."""
    is_unchecked: bool = False
    """The recipe's contract is still to be checked in this process, on the first micro-batch of a step."""
    options: Options = ()
    """Of the optimizer's groups: those that are others than in the checkpoint, by settings."""
    structure: Structure = field(init=False)
    """What model and optimizer consist of before the first step of this start."""
    weights_rest: bool = False
    """The model's forward pass is known to leave its weights alone."""
    being_copied: Snapshot | None = None
    """What is being read of all this, while a GPU goes on."""
    num_steps_then: int | None = None
    """Steps that the run was to have when the checkpoint that it goes on from was saved."""
    best_loss: float = math.inf
    """The lowest held-out loss of the run so far."""
    figures: RankFigures = field(default_factory=RankFigures)
    """Of this rank's steps before the line of metrics that is being made."""
    ranks: list[RankFigures] = field(default_factory=list)
    """The same of all ranks."""
    is_evaluation_due: bool = False
    """A request to stop came before the evaluation after this step."""
    _acting: dict[str, list[Component]] = field(default_factory=dict, init=False, repr=False)

    def __enter__(self) -> Training:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error is None or getattr(error, "is_on_all_ranks", False))

    def close(self, is_agreed: bool = True) -> None:
        """End the threads and processes that read, and let the components end. Collective where `is_agreed`."""
        for loader in (self.reader, *self.held_out.values()):
            loader.close()
        for component in self.components:
            component.close(is_agreed)

    def before_change(self) -> None:
        """Have what comes next, and may change anything, wait for what is still being copied; the host does not."""
        if self.being_copied is not None:
            self.being_copied.hold()
            self.being_copied = None

    def component(self, kind: type[C]) -> C | None:
        """Return the component of a class, if the job has one."""
        return next((component for component in self.components if isinstance(component, kind)), None)

    def acting(self, method: str) -> list[Component]:
        """Return the components that have a method of their own by this name; found once, as a step asks often."""
        found = self._acting.get(method)
        if found is None:
            found = self._acting[method] = acting(self.components, method)
        return found

    def before_backward(self, loss: Tensor) -> Tensor:
        """Return what is differentiated for a micro-batch's loss, a scalar."""
        if self.acting("before_backward"):
            self.before_change()
        for component in self.acting("before_backward"):
            loss = component.before_backward(loss)
        return loss

    def after_backward(self, step: Step) -> None:
        """Let the components act on the averaged gradients. Collective."""
        self.before_change()
        for component in self.acting("after_backward"):
            component.after_backward(self, step)

    def after_update(self, step: Step) -> None:
        """Let the components act on the updated weights. Collective."""
        for component in self.acting("after_update"):
            component.after_update(self, step)

    def before_looking(self) -> None:
        """Let the components make equal what is about to be evaluated, compared or saved. Collective."""
        self.before_change()
        for component in self.components:
            component.before_looking(self)

    def reason_to_end(self, world: World, is_evaluated: bool) -> str:
        """Return why a component ends the run here, if one of any rank does; empty: it goes on. Collective."""
        asked = [item for item in self.acting("reason_to_end") if is_evaluated or item.ends_after_steps]
        if not asked:
            return ""
        own = next(filter(None, (component.reason_to_end() for component in asked)), "")
        if not bool(world.all_reduce(torch.tensor(float(bool(own)), device="cpu"), "max", "end")):
            return ""
        reason = str(next(filter(None, world.all_gather_object(own, "end.reason"))))
        for component in asked:
            component.end(reason)
        return reason

    def evaluated_component(self) -> Component | None:
        """Return the component whose weights are evaluated instead of the model's."""
        return next((item for item in self.components if item.evaluated_weights() is not None), None)

    def use_evaluated_weights(self) -> None:
        """Put the weights that are evaluated into the model, for good."""
        self.before_change()
        component = self.evaluated_component()
        weights = component.evaluated_weights() if component else None
        own = model_weights(self.model)
        with torch.no_grad():
            for name, tensor in (weights or {}).items():
                own[name].copy_(tensor)

    @contextmanager
    def with_evaluated_weights(self) -> Iterator[None]:
        """Have the weights that are evaluated in the model for a while."""
        component = self.evaluated_component()
        if component is None:
            yield
            return
        own = model_weights(self.model)
        kept = {name: own[name].clone() for name in component.evaluated_weights() or {}}
        self.use_evaluated_weights()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in kept.items():
                    own[name].copy_(tensor)


def start_training(job: Job) -> Training:
    """Put model and optimizer on the device: rank 0's weights, or the newest checkpoint's, on every rank. Collective.

    Raises:
        ConfigError: the model, the optimizer or the ranks cannot do what the settings ask.
        ResumeError: the checkpoint belongs to another model, other data or other settings.
    """
    world = job.world
    if world.device.type == "cuda":  # streams and events are those of the current one
        torch.cuda.set_device(world.device)
    data = compare_data(job) if job.directory is not None else {}
    model = world.together(lambda: prepare_model(job.task.model, job.config, world), "model")
    components = world.together(lambda: build_components(job), "components")
    in_step = has_synchronized_layers(model)
    optimizer, rates = world.together(lambda: wrapped_optimizer(job, model, components), "optimizer")
    training = Training(
        model=model,
        optimizer=optimizer,
        rates=rates,
        components=components,
        strategy=job.strategy,
        randomness=MicroBatchRandomness(
            world.device,
            model=model,
            is_compiled=is_compiled(model),
            own=generators_in((model, job.task.loss_sums)),
        ),
        reader=Loader(
            job.task.train_data,
            job.order,
            world.rank,
            in_step=in_step,
            pin_memory=world.device.type == "cuda",
            reading=job.reading,
        ),
        runs_in_step=in_step,
        data=data,
    )
    with world.progress.during("resume"):
        found = world.together(lambda: read_latest(job, model, data) if world.rank == 0 else None, "resume")
        of_optimizer = found.pop("optimizer") if found else None
        state = handed_out(world, components, found)
    if state is not None:
        training.step, training.is_evaluation_due = state["step"], bool(state["is_evaluation_due"])
        training.num_steps_then, training.best_loss = state.get("num_steps"), state.get("best_loss", math.inf)
        training.options = world.together(
            lambda: changed_options(job, model, state["config"].get("optim", {})), "options"
        )
        own = job.strategy.part_of_state(world, training, of_optimizer)
        del of_optimizer  # not twice, while there is no need
        world.together(lambda: restore_optimizer(job, training, own), "restore.optimizer")
        del own
    world.broadcast_state(model, training.optimizer if job.strategy.shares_state else None)
    world.together(lambda: _begin(job, training, state), "begin")
    world.check_replicas(replicated_tensors(training), "start")
    return training


def _begin(job: Job, training: Training, state: Mapping[str, Any] | None) -> None:
    """Let the components begin, and make sure that what there is now could be saved, and loaded again.

    Raises:
        ConfigError: a component cannot do what is asked of it, or a checkpoint could not hold the state.
    """
    if job.directory is not None:  # a rehearsal saves nothing
        check_types(training.model)
    for component in training.components:
        component.attach(training)
        component.begin(training.model)
        if state is not None:
            with in_a_sentence(job):
                restore(job, component, state["components"])
    for line in dropped_lines(training.components, state["components"]) if state is not None else ():
        job.log.say(line)
    check_can_be_saved(training.model)
    training.structure = Structure(training.model, training.optimizer)
    storable(extra_state(training.model), "the model's state_dict()")
    storable(training.optimizer.state_dict(), "the optimizer's state")


def wrapped_optimizer(job: Job, model: nn.Module, components: list[Component]) -> tuple[WrappedOptimizer, GroupRates]:
    """Return the task's optimizer over `model`, averaging, and the rates of its groups; raises as `start_training`."""
    comm = job.config.comm
    options: dict[str, Any] = {"accum_steps": job.plan.accum_steps, "op": comm.op}
    options["bucket_bytes"] = comm.bucket_mib << 20
    options["offload"] = job.is_offloaded
    options["waits_for_caller"] = True
    options["warns_of_copies"] = False  # the order deals the samples out, and a data set may hold equal ones
    for component in components:
        options.update(component.wrap_options)
    optimizer = checked_optimizer(job.task.build_optimizer(job.config.optim, model), model)
    rates = GroupRates(job, optimizer)
    if product_type(job.config.train.precision) == torch.bfloat16:
        multiply_in_bf16(optimizer)
    return job.strategy.wrap(job.world, optimizer, model, **options), rates


def replicated_tensors(training: Training, with_optimizer: bool = True) -> dict[str, Tensor]:
    """Return what must be equal on all ranks now, by name: model, components and, unless left out, optimizer.

    Collective.
    """
    tensors = training.strategy.replicated_tensors(training, with_optimizer)
    for component in training.components:
        if component.is_replicated:
            tensors.update(nested_tensors(component.state_dict(), component.name))
    return tensors
