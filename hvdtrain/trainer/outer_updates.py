"""The step that ranks which train apart take together: what they have moved by, averaged whole or by fragments.

With `--comm.fragments` the model is averaged in parts, each once in a period and at a step of its own, so that less
travels at a time; with `--comm.overlap-steps` an average has so many steps to arrive, in which training goes on
(Streaming DiLoCo, arXiv:2501.18512, algorithm 2). Fragment p of P begins to travel after the steps t > 0 with
`(t - floor(p H / P)) mod H = 0`, counted from the end of `--comm.sync-warmup-steps`, in each of which everything is
averaged as it is (post-local SGD, arXiv:1808.07217). When it is due, s steps later, with the update `dW_i` of rank i at
step t,

    V <- outer step from V along mean_i(dW_i)        V are the weights of the last average
    W_i <- mix W_i + (1 - mix) V                     without an overlap: W_i <- V

or, with `--comm.overlap-rule delayed`, `W_i <- V + (W_i - W_i(t))`: what a rank has moved by since it sent is kept
(arXiv:2006.00441).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import counted
from hvdtrain.models.walk import owned_by
from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.fragments import Schedule, in_fragments
from hvdtrain.trainer.model import wide_type
from hvdtrain.trainer.wire import about, in_parts
from hvdtrain.world import Codec, codec_for
from hvdtrain.world.filling import real

if TYPE_CHECKING:
    from hvdtrain.settings import CommConfig
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training

NESTEROV_LR = 0.7  # as DiLoCo's, arXiv:2311.08105, section 3.1


class OuterUpdates(Component):
    """The weights of the last average, and the step that is taken from them: alike on all ranks."""

    name = "outer"

    def __init__(self, job: Job) -> None:
        comm = job.config.comm
        is_nesterov = comm.outer == "nesterov"
        self.schedule = Schedule.of(comm)
        self.codecs: list[Codec] = [codec_for(comm, job.task.model) for _ in range(comm.fragments)]
        """Of each fragment: its averages are steps of its own."""
        self._world, self._chunk_bytes, self._say = job.world, comm.bucket_mib << 20, job.log.say
        self._lr = comm.outer_lr or (NESTEROV_LR if is_nesterov else 1.0)
        self._momentum = _momentum(comm.outer_momentum, self._lr, job.world.size) if is_nesterov else 0.0
        late = comm.overlap_mix if comm.overlap_rule == "mix" else None
        self._mix = late if comm.overlap_steps else 0.0
        """None: all that was moved by since is kept."""
        self._training: Training | None = None
        self._last: dict[str, Tensor] = {}
        self._velocity: dict[str, Tensor] = {}
        self._fragments: list[list[str]] = [[] for _ in self.codecs]
        self._frozen: dict[str, nn.Parameter] = {}
        """What the optimizer has and nothing has moved yet: it does not travel."""
        self._num_owned = 0
        """Parameters of the optimizer when that was last found out."""
        self._under_way: dict[int, Callable[[], dict[str, Tensor]]] = {}
        self.busy_until = 0
        """The step after which the last of them is due."""
        self._means: dict[str, Tensor] = {}
        """Those that have arrived before they are due."""
        self.sent: dict[str, Tensor] = {}
        """This rank's own updates of what is under way, or has not been taken."""
        self.about = self._about(comm)
        self.about += f"\n{wire}" if (wire := about(job, self.codecs[0], "average")) else ""

    def _about(self, comm: CommConfig) -> str:
        what = f"Nesterov's momentum {self._momentum:.3g}, " if self._momentum else ""
        steps = "after every step" if comm.period == 1 else f"every {comm.period:,} steps"
        parts = f" in {comm.fragments} fragments" if comm.fragments > 1 else ""
        own = "what was moved by meanwhile kept" if self._mix is None else f"own weights x {self._mix:g}"
        late = f", taken {counted(comm.overlap_steps, 'step')} later, {own}" if comm.overlap_steps else ""
        warmup = comm.sync_warmup_steps
        several = f"each of the first {warmup:,} steps" if warmup > 1 else "the first step"
        first = f", and after {several}" if warmup else ""
        return (
            f"updates:    averaged {steps}{parts}{late}{first}, not gradients ({what}outer learning rate {self._lr:g})"
        )

    def attach(self, training: Training) -> None:
        """See the optimizer."""
        self._training = training
        if self.schedule.overlap_steps:
            self._world.give_way()

    def begin(self, model: nn.Module) -> None:
        """See what may learn; where memory is counted and nothing is trained, begin with it."""
        self._frozen = moved_by_name(model, self._training)
        if self._training is None:
            self._take_in(list(self._frozen))

    @torch.no_grad()
    def after_backward(self, training: Training, step: Step) -> None:
        """Take in what begins to learn, before it is moved for the first time: all ranks have it alike."""
        num_owned = sum(len(group["params"]) for group in training.optimizer.param_groups)
        if num_owned != self._num_owned:
            self._num_owned = num_owned
            moved = moved_by_name(training.model, training)
            self._frozen = {name: parameter for name, parameter in moved.items() if name not in self._last}
        self._take_in([name for name, parameter in self._frozen.items() if parameter.requires_grad])

    def _take_in(self, names: Sequence[str]) -> None:
        """Begin to average parameters; those that come later join the smallest fragment, others stay where they are."""
        for name in names:
            self._last[name] = _widened(self._frozen.pop(name))
            if self._momentum:
                self._velocity[name] = torch.zeros_like(self._last[name])
        if names and not any(self._fragments):
            self._fragments = self._divided()
        elif names:
            for name in names:
                sizes = [sum(self._last[own].numel() for own in fragment) for fragment in self._fragments]
                self._fragments[sizes.index(min(sizes))].append(name)

    def _divided(self) -> list[list[str]]:
        return in_fragments({name: last.numel() for name, last in self._last.items()}, len(self.codecs))

    def names(self) -> Collection[str]:
        """Return what is averaged: parameters that learn, or have learned."""
        return self._last.keys()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Send what is to be averaged after `step` completed steps, and take what is due. Collective."""
        begins, ends = self.schedule.begins(step), self.schedule.ends(step)
        if begins or ends:
            self._world.progress.enter("communication")
        for fragment in begins:
            self._under_way[fragment] = self._send(fragment)
            self.busy_until = step + (0 if self.schedule.warms_up(step) else self.schedule.overlap_steps)
        for fragment in ends:
            self._take(fragment, self.schedule.warms_up(step))

    def before_looking(self, training: Training) -> None:
        """Wait for what is under way: the state is about to be compared, and has no place for it."""
        self.arrive()

    @torch.no_grad()
    def arrive(self) -> None:
        """Wait for what is under way, and keep it until it is due. Collective."""
        for fragment in sorted(self._under_way):
            self._means |= self._under_way.pop(fragment)()

    def _send(self, fragment: int) -> Callable[[], dict[str, Tensor]]:
        """Put a fragment's updates on the wire; returns what waits for their means. Collective."""
        assert self._training is not None
        moved = moved_by_name(self._training.model, self._training)
        codec, means = self.codecs[fragment], dict[str, Tensor]()
        waits: list[tuple[str, list[Tensor], Callable[[], Tensor]]] = []
        own = [name for name in self._fragments[fragment] if name in moved]
        for dtype in dict.fromkeys(self._last[name].dtype for name in own):
            names = [name for name in own if self._last[name].dtype == dtype]
            updates = {name: moved[name].detach().to(dtype, copy=True).sub_(self._last[name]) for name in names}
            means |= updates
            if self._mix is None:
                self.sent |= {name: update.clone() for name, update in updates.items()}
            for i, some in enumerate(in_parts(updates, self._chunk_bytes)):
                waits.append(self._start(codec, f"outer.{fragment}", f"{dtype}.{i}", some, updates))

        def arrived() -> dict[str, Tensor]:
            for part, numbers, wait in waits:
                found = torch.split_with_sizes(wait(), [item.numel() for item in numbers])
                codec.received(part, None)
                for item, mean in zip(numbers, found, strict=True):
                    item.copy_(mean.view(item.shape))
            codec.settle(False)
            return means

        return arrived

    def _start(
        self, codec: Codec, prefix: str, part: str, names: Sequence[str], updates: Mapping[str, Tensor]
    ) -> tuple[str, list[Tensor], Callable[[], Tensor]]:
        """Send updates of one type together; returns the part's name, where the means belong, and what waits."""
        numbers = [real(updates[name]) for name in names]
        codec.lay_out(part, [(name, item.shape) for name, item in zip(names, numbers, strict=True)])
        flat = torch.cat([item.flatten() for item in numbers]).div_(self._world.size)
        flat = flat.to(codec.buffer_type(flat.dtype))
        return part, numbers, codec.start(self._world, prefix, part, flat)

    def _take(self, fragment: int, as_it_is: bool) -> None:
        """Move from the last average by the means, perhaps as they are, and put that into the model."""
        assert self._training is not None
        if fragment in self._under_way:
            self._means |= self._under_way.pop(fragment)()
        moved = moved_by_name(self._training.model, self._training)
        for name in self._fragments[fragment]:
            if name in self._means and name in moved:
                last, own, mean = self._last[name], moved[name], self._means.pop(name)
                if as_it_is:
                    self.sent.pop(name, None)
                    own.copy_(last.add_(mean))
                    continue
                if self._mix is None:  # another number of ranks has gone on from the mean of those that sent
                    since = own.to(last.dtype) - last - self.sent.pop(name, mean)
                    self._move(name, mean)
                    own.copy_(since.add_(last))
                    continue
                self._move(name, mean)
                own.copy_(last + self._mix * (own.to(last.dtype) - last) if self._mix else last)

    def _move(self, name: str, update: Tensor) -> None:
        if self._momentum:
            velocity = self._velocity[name].mul_(self._momentum).add_(update)
            update = update.add(velocity, alpha=self._momentum)
        self._last[name].add_(update, alpha=self._lr)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the last average, the momentum, and means that are not due yet; see `arrive`."""
        assert not self._under_way
        state = {"last": self._last, "velocity": self._velocity, "means": self._means}
        kept: dict[str, Any] = {name: tensors for name, tensors in state.items() if tensors or name == "last"}
        return {**kept, "fragments": self._fragments} if len(self.codecs) > 1 else kept

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average."""
        assert self._training is not None
        moved = moved_by_name(self._training.model, self._training)
        self._take_in([name for name in state["last"] if name in moved and name not in self._last])
        for name, last in self._last.items():
            last.copy_(state["last"][name])
        for name, velocity in state.get("velocity", {}).items():
            if name in self._velocity:
                self._velocity[name].copy_(velocity)
        if state.get("velocity") and not self._momentum:
            self._say("WARNING: averages had a momentum (--comm.outer nesterov), and go on without: it is dropped")
        fragments = state.get("fragments", [])
        are_mine = len(fragments) == len(self.codecs) and {*itertools.chain(*fragments)} == self._last.keys()
        self._fragments = [list(names) for names in fragments] if are_mine else self._divided()
        self._means = {
            name: mean.to(self._last[name].device, self._last[name].dtype)
            for name, mean in state.get("means", {}).items()
            if name in self._last
        }


def _momentum(given: float | None, outer_lr: float, size: int) -> float:
    """Return the momentum that was asked for, or one with which alike updates count sqrt(ranks) times in the long run.

    That is outer_lr / (1 - momentum). Each rank's optimizer sees the noise of its own share of the batch: Adam's second
    moment is larger for it, and its steps along the gradient are smaller, by up to sqrt(ranks).
    """
    return given if given is not None else max(0.0, 1 - outer_lr / math.sqrt(size))


def _widened(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to(wide_type(parameter.dtype), copy=True)


def moved_by_name(model: nn.Module, training: Training | None) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer moves, by name; before there is one, those that can be trained."""
    named = dict(model.named_parameters())
    if training is None:
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    own = set(owned_by(training.optimizer))
    return {name: parameter for name, parameter in named.items() if parameter in own}
