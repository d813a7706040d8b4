"""`--comm.sync local`: ranks train apart and average what they have moved by once every `--comm.period` steps.

Between averages each rank takes steps of its own, by its own part of each global batch. Then, with the weights W of the
last average and the update of rank i, `dW_i = W_i - W`,

    W <- W + outer_lr x mean_i(dW_i)

(local SGD, arXiv:1805.09767), or, with `--comm.outer nesterov`, a step of SGD with Nesterov's momentum along the mean
update, as in DiLoCo (arXiv:2311.08105). What a rank's optimizer remembers stays its own. With plain SGD, a period of
one step and outer_lr 1 this is what averaging gradients in every step gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.walk import owned_by
from hvdtrain.process.launch import Launch
from hvdtrain.settings import Config
from hvdtrain.trainer.buffers import ChangingBuffers
from hvdtrain.trainer.component import Component
from hvdtrain.trainer.model import wide_type
from hvdtrain.trainer.sharded import Sharded
from hvdtrain.trainer.strategy import EveryStep, Strategy, model_tensors
from hvdtrain.trainer.wire import about, in_parts, redistributed
from hvdtrain.world import Codec, SoloWorld, World, WrappedOptimizer, codec_for
from hvdtrain.world.filling import real

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training

C = TypeVar("C", bound=Component)
NESTEROV_LR = 0.7  # as DiLoCo's, arXiv:2311.08105, section 3.1


def strategy_of(config: Config, size: int) -> Strategy:
    """Return what `--comm.sync` asks for, on this many ranks.

    Raises:
        ConfigError: another setting needs ranks that are equal after every step.
    """
    if config.comm.sync == "every-step" or size == 1:
        return Sharded() if config.optim.shard and size > 1 else EveryStep()
    refused = {
        "--train.precision fp16": config.train.precision == "fp16",
        "--train.ema": config.train.ema is not None,
        "--health.noise-scale": config.health.noise_scale,
        "--health.spikes skip": config.health.spikes == "skip",
        "--log.grad-norms": config.log.grad_norms,
        "--model.sync-batch-norm": config.model.sync_batch_norm,
        "--comm.op adasum": config.comm.op == "adasum",
        "--optim.shard": config.optim.shard,
    }
    for setting in (setting for setting, is_given in refused.items() if is_given):
        raise ConfigError(
            f"{setting} needs what all ranks share in each step, and with --comm.sync local they share nothing between"
            " two averages: leave one of them out"
        )
    return LocalUpdates(config.comm.period)


class LocalUpdates(Strategy):
    """Ranks are equal after every `period`-th step, and drift apart between."""

    agrees = False

    def __init__(self, period: int) -> None:
        self._period = period

    def components(self, job: Job) -> list[Component]:
        """Return what is alike on all ranks, and what is each one's own."""
        outer = OuterUpdates(job)
        return [outer, OwnProgress(job, self, outer)]

    def wrap(
        self, world: World, optimizer: torch.optim.Optimizer, model: nn.Module, **options: Any
    ) -> WrappedOptimizer:
        """Leave each rank its own gradients."""
        alone = SoloWorld(world.device, Launch("none"))
        return alone.wrap(optimizer, model, accum_steps=options["accum_steps"], offload=options["offload"])

    def is_equal_after(self, step: int) -> bool:
        """Return whether a period ends with this step, or training has not begun."""
        return step % self._period == 0

    def agree(self, world: World, is_finite: Tensor) -> Tensor:
        """Return this rank's answer: a step that does not count for one rank may count for the others."""
        return is_finite

    def after_update(self, world: World, training: Training) -> None:
        """At the end of a period, average the updates."""
        if self.is_equal_after(training.step):
            world.progress.enter("communication")
            _part(training, OuterUpdates).step()

    def made_equal(self, world: World, training: Training) -> AbstractContextManager[None]:
        """Within a period, have the mean of the ranks' weights and buffers in the model for a while."""
        if self.is_equal_after(training.step):
            return contextlib.nullcontext()
        return _part(training, OwnProgress).averaged()

    def replicated_tensors(self, training: Training, with_optimizer: bool) -> dict[str, Tensor]:
        """Return the model at the end of a period, nothing within it; the optimizer is each rank's own."""
        return model_tensors(training.model) if self.is_equal_after(training.step) else {}

    def optimizer_state(self, world: World, training: Training) -> dict[str, Any]:
        """Return rank 0's; `OwnProgress` keeps everybody's."""
        return training.optimizer.state_dict()

    def end(self, world: World, training: Training) -> None:
        """Leave every rank with the mean where the run ends within a period: it is what was evaluated and saved."""
        if not self.is_equal_after(training.step):
            _part(training, OwnProgress).average()


class OuterUpdates(Component):
    """The weights of the last average, and the step that is taken from them: alike on all ranks."""

    name = "outer"

    def __init__(self, job: Job) -> None:
        comm = job.config.comm
        is_nesterov = comm.outer == "nesterov"
        self.codec: Codec = codec_for(comm)
        self._world, self._chunk_bytes = job.world, comm.bucket_mib << 20
        self._lr = comm.outer_lr or (NESTEROV_LR if is_nesterov else 1.0)
        self._momentum = comm.outer_momentum if is_nesterov else 0.0
        self._training: Training | None = None
        self._last: dict[str, Tensor] = {}
        self._velocity: dict[str, Tensor] = {}
        what = f"Nesterov's momentum {self._momentum:g}, " if is_nesterov else ""
        steps = "in every step" if comm.period == 1 else f"every {comm.period:,} steps"
        self.about = f"updates:    averaged {steps}, not gradients ({what}outer learning rate {self._lr:g})"
        self.about += f"\n{wire}" if (wire := about(job, self.codec)) else ""

    def attach(self, training: Training) -> None:
        """See the optimizer."""
        self._training = training

    def begin(self, model: nn.Module) -> None:
        """Begin with the weights as they are."""
        moved = _moved(model, self._training)
        self._last = {
            name: parameter.detach().to(wide_type(parameter.dtype), copy=True) for name, parameter in moved.items()
        }
        if self._momentum:
            self._velocity = {name: torch.zeros_like(last) for name, last in self._last.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Move from the last average by the mean of all ranks' updates, and put that into the model. Collective."""
        assert self._training is not None
        moved = _moved(self._training.model, self._training)
        for dtype in dict.fromkeys(last.dtype for last in self._last.values()):
            names = [name for name, last in self._last.items() if last.dtype == dtype]
            updates = [moved[name].detach().to(dtype, copy=True).sub_(self._last[name]) for name in names]
            self._average(dict(zip(names, updates, strict=True)), str(dtype))
            for name, update in zip(names, updates, strict=True):
                self._move(name, update)
                moved[name].copy_(self._last[name])
        self.codec.settle(False)

    def _average(self, updates: Mapping[str, Tensor], kind: str) -> None:
        """Turn updates of one type into their means over the ranks, sent in parts of whole tensors. Collective."""
        waits: list[tuple[str, list[Tensor], Callable[[], Tensor]]] = []
        for i, names in enumerate(in_parts(updates, self._chunk_bytes)):
            part, numbers = f"{kind}.{i}", [real(updates[name]) for name in names]
            self.codec.lay_out(part, [(name, item.shape) for name, item in zip(names, numbers, strict=True)])
            flat = torch.cat([item.flatten() for item in numbers]).div_(self._world.size)
            flat = flat.to(self.codec.buffer_type(flat.dtype))
            waits.append((part, numbers, self.codec.start(self._world, "outer", part, flat)))
        for part, numbers, wait in waits:
            means = torch.split_with_sizes(wait(), [item.numel() for item in numbers])
            self.codec.received(part, None)
            for item, mean in zip(numbers, means, strict=True):
                item.copy_(mean.view(item.shape))

    def _move(self, name: str, update: Tensor) -> None:
        if self._momentum:
            velocity = self._velocity[name].mul_(self._momentum).add_(update)
            update = update.add(velocity, alpha=self._momentum)
        self._last[name].add_(update, alpha=self._lr)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the last average, and the momentum if there is any."""
        return {"last": self._last, **({"velocity": self._velocity} if self._momentum else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average."""
        for name, last in self._last.items():
            last.copy_(state["last"][name])
        for name, velocity in self._velocity.items():
            velocity.copy_(state["velocity"][name])


class OwnProgress(Component):
    """What each rank has for itself: weights within a period, its optimizer's state, what its codec remembers."""

    name = "own_progress"
    is_replicated = False

    def __init__(self, job: Job, strategy: LocalUpdates, outer: OuterUpdates) -> None:
        self._job, self._strategy, self._outer = job, strategy, outer
        self._training: Training | None = None
        self._kept: dict[str, Tensor] | None = None
        """The weights that are this rank's own, while the mean is in the model."""

    def attach(self, training: Training) -> None:
        """See model and optimizer."""
        self._training = training

    def _own(self) -> dict[str, Tensor]:
        """Return what differs between ranks within a period: weights that the optimizer moves, and buffers."""
        assert self._training is not None
        model = self._training.model
        frozen = dict(model.named_parameters()).keys() - _moved(model, self._training).keys()
        return {name: tensor.detach() for name, tensor in model_tensors(model).items() if name not in frozen}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the ranks' mean in the model for a while. Collective."""
        self._kept = {name: tensor.clone() for name, tensor in self._own().items()}
        self.average()
        try:
            yield
        finally:
            own = self._own()
            for name, tensor in self._kept.items():
                own[name].copy_(tensor)
            self._kept = None

    @torch.no_grad()
    def average(self) -> None:
        """Put the ranks' mean into the model. Collective."""
        assert self._training is not None
        weights = _moved(self._training.model, self._training)
        self._job.world.average_tensors([weight.detach() for weight in weights.values()], "local.weights")
        buffers = self._training.component(ChangingBuffers)
        if buffers is not None:
            buffers.average(self._job.world)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's own."""
        if self._training is None:  # a rehearsal that only counts memory
            return {}
        is_equal = self._strategy.is_equal_after(self._training.step)
        weights = {} if is_equal else self._kept if self._kept is not None else self._own()
        state = {"weights": weights, "optimizer": self._training.optimizer.state_dict()}
        return {**state, "codec": self._outer.codec.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as this rank, or from the mean of all."""
        assert self._training is not None
        self._training.optimizer.load_state_dict(state["optimizer"])
        self._outer.codec.load_state_dict(state["codec"])
        own = self._own()
        with torch.no_grad():
            for name, tensor in state["weights"].items():
                own[name].copy_(tensor)

    def redistribute(self, states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any] | None:
        """Return what another number of ranks goes on with: the mean of the weights, an optimizer's state of those."""
        self._job.log.say(
            f"WARNING: {len(states)} ranks have trained apart, and {self._job.world.size} go on: from the mean of"
            " their weights, with the optimizers' states of as many of them"
        )
        codec = redistributed(self._job, self._outer.codec, [state["codec"] for state in states])
        return {"weights": {}, "optimizer": states[rank % len(states)]["optimizer"], "codec": codec or {}}


def _part(training: Training, kind: type[C]) -> C:
    """Return the component of a class, which the strategy has brought itself."""
    component = training.component(kind)
    assert component is not None
    return component


def _moved(model: nn.Module, training: Training | None) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer moves, by name; before there is one, those that can be trained."""
    named = dict(model.named_parameters())
    if training is None:
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    own = set(owned_by(training.optimizer))
    return {name: parameter for name, parameter in named.items() if parameter in own}
