"""`--comm.sync local`: ranks train apart and average what they have moved by once every `--comm.period` steps.

Between averages each rank takes steps of its own, by its own part of each global batch. Then, with the weights W of the
last average and the update of rank i, `dW_i = W_i - W`,

    W <- W + outer_lr x mean_i(dW_i)

(local SGD, arXiv:1805.09767), or, with `--comm.outer nesterov`, a step of SGD with Nesterov's momentum along the mean
update, as in DiLoCo (arXiv:2311.08105). What a rank's optimizer remembers stays its own. With plain SGD, a period of
one step and outer_lr 1 this is what averaging gradients in every step gives. The formula is in `outer_updates.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.process.launch import Launch
from hvdtrain.settings import Config
from hvdtrain.trainer.buffers import ChangingBuffers
from hvdtrain.trainer.changed_options import with_options
from hvdtrain.trainer.component import Component
from hvdtrain.trainer.fragments import Schedule
from hvdtrain.trainer.outer_updates import OuterUpdates
from hvdtrain.trainer.sharded import Sharded
from hvdtrain.trainer.strategy import EveryStep, Strategy, model_tensors
from hvdtrain.trainer.wire import redistributed
from hvdtrain.world import SoloWorld, World, WrappedOptimizer, codec_for
from hvdtrain.world.sharded import check_sharding

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training

C = TypeVar("C", bound=Component)


def strategy_of(config: Config, size: int) -> Strategy:
    """Return what `--comm.sync` asks for, on this many ranks.

    Raises:
        ConfigError: settings do not go together, on however many ranks: a run may grow from one to several.
    """
    comm, is_sharded = config.comm, config.optim.shard
    if comm.sync == "local":
        _check_apart(config)
    elif is_sharded:
        check_sharding(comm.op, codec_for(comm))
    if size == 1 or comm.sync == "every-step":
        return Sharded() if is_sharded and size > 1 else EveryStep()
    return LocalUpdates(Schedule.of(comm))


def _check_apart(config: Config) -> None:
    """Raise ConfigError where a setting needs ranks that are equal after every step."""
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


class LocalUpdates(Strategy):
    """Ranks are equal at the end of each period, if all is averaged then, and drift apart between."""

    agrees = False

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

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
        """Return whether everything is averaged after this step, or training has not begun."""
        return self._schedule.is_equal_after(step)

    def agree(self, world: World, is_finite: Tensor) -> Tensor:
        """Return this rank's answer: a step that does not count for one rank may count for the others."""
        return is_finite

    def after_update(self, world: World, training: Training) -> None:
        """Average the updates that it is time for."""
        _part(training, OuterUpdates).after_step(training.step)

    def busy_until(self, training: Training) -> int:
        """Return when the last average that has been begun is due."""
        return _part(training, OuterUpdates).busy_until

    @contextlib.contextmanager
    def made_equal(self, world: World, training: Training) -> Iterator[None]:
        """Within a period, have the mean of the ranks' weights and buffers in the model for a while."""
        self.is_made_equal = True
        try:
            if self.is_equal_after(training.step):
                yield
                return
            _part(training, OuterUpdates).arrive()
            with _part(training, OwnProgress).averaged():
                yield
        finally:
            self.is_made_equal = False

    def replicated_tensors(self, training: Training, with_optimizer: bool) -> dict[str, Tensor]:
        """Return the model at the end of a period, nothing within it; the optimizer is each rank's own."""
        return model_tensors(training.model) if self.is_equal_after(training.step) else {}

    def optimizer_state(self, world: World, training: Training) -> dict[str, Any]:
        """Return rank 0's; `OwnProgress` keeps everybody's."""
        return training.optimizer.state_dict()

    def end(self, world: World, training: Training) -> None:
        """Leave every rank with the mean where the run ends within a period: it is what was evaluated and saved."""
        if not self.is_equal_after(training.step):
            _part(training, OuterUpdates).arrive()
            _part(training, OwnProgress).average()


class OwnProgress(Component):
    """What each rank has for itself: weights and updates within a period, its optimizer's state, its codec's memory."""

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
        """Return what differs between ranks within a period: weights that learn, and buffers."""
        assert self._training is not None
        model = self._training.model
        equal = dict(model.named_parameters()).keys() - self._outer.names()
        return {name: tensor.detach() for name, tensor in model_tensors(model).items() if name not in equal}

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
        weights, averaged = self._training.model.named_parameters(), self._outer.names()
        self._job.world.average_tensors([item.detach() for name, item in weights if name in averaged], "local.weights")
        buffers = self._training.component(ChangingBuffers)
        if buffers is not None:
            buffers.average_for_a_look(self._job.world)

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's own."""
        if self._training is None:  # a rehearsal that only counts memory
            return {}
        is_equal = self._strategy.is_equal_after(self._training.step)
        weights = {} if is_equal else self._kept if self._kept is not None else self._own()
        state = {"weights": weights, "optimizer": self._training.optimizer.state_dict(), "sent": self._outer.sent}
        return {**state, "codec": [codec.state_dict() for codec in self._outer.codecs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as this rank, or from the mean of all."""
        assert self._training is not None
        self._training.optimizer.load_state_dict(with_options(state["optimizer"], self._training.options))
        saved = _as_list(state["codec"])
        for codec, own in zip(self._outer.codecs, saved if self._takes(saved) else (), strict=False):
            codec.load_state_dict(own)
        own = self._own()
        self._outer.sent = {name: tensor.to(own[name].device) for name, tensor in state.get("sent", {}).items()}
        if state["weights"] and self._strategy.is_equal_after(self._training.step):
            self._job.log.say(
                "WARNING: ranks have trained apart, and by the settings of now they are equal after step"
                f" {self._training.step:,}: they go on from the mean of their weights"
            )
            state = {**state, "weights": {}}
        with torch.no_grad():
            for name, tensor in state["weights"].items():
                own[name].copy_(tensor)
        buffers = self._training.component(ChangingBuffers)
        if buffers is not None:
            buffers.keep()

    def redistribute(self, states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any] | None:
        """Return what another number of ranks goes on with: the mean of the weights, an optimizer's state of those."""
        self._job.log.say(
            f"WARNING: {len(states)} ranks have trained apart, and {self._job.world.size} go on: from the mean of"
            " their weights, with the optimizers' states of as many of them"
        )
        of_ranks = [_as_list(state["codec"]) for state in states]
        codecs: list[Any] = []
        for fragment, codec in enumerate(self._outer.codecs if self._takes(of_ranks[0]) else ()):
            own = [of_rank[fragment] for of_rank in of_ranks]
            # What is said of one fragment holds for all.
            is_first = not any(codecs)
            codecs.append(redistributed(self._job, codec, own) if is_first else codec.merged(own, self._job.world.size))
        kept = [codec or {} for codec in codecs]
        return {"weights": {}, "optimizer": states[rank % len(states)]["optimizer"], "codec": kept}

    def _takes(self, saved: Sequence[Any]) -> bool:
        """Return whether the fragments' codecs can take up what was saved of as many; say where something is lost."""
        codecs = self._outer.codecs
        if len(saved) == len(codecs) and codecs[0].remembers:
            return True
        if any(saved):
            other = f"--comm.compression {codecs[0].name}" if len(saved) == len(codecs) else "other --comm.fragments"
            self._job.log.say(
                f"WARNING: ranks had a part of their updates still to send, and go on with {other}: it is dropped"
            )
        return False


def _as_list(saved: Any) -> list[Any]:
    """Return what the codec of each fragment has saved; before there were fragments, one codec saved its state."""
    return saved if isinstance(saved, list) else [saved]


def _part(training: Training, kind: type[C]) -> C:
    """Return the component of a class, which the strategy has brought itself."""
    component = training.component(kind)
    assert component is not None
    return component
