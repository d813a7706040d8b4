"""Buffers that training changes, such as running statistics: kept equal on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.models.private_modules import has_buffers, is_saved_buffer
from hvdtrain.models.private_torch import copy_all_, is_fake
from hvdtrain.trainer.component import Component, Step
from hvdtrain.world import BesideGradients, World, digest_of, per_rank_buffers

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training


# Buffers of more numbers are worth a kernel each; and what is put together takes memory once more.
_SMALL = 1 << 16


class ChangingBuffers(Component):
    """Averages, after each step, the buffers that a step changes on any rank.

    Which they are is found out in the first step, and again when a part of the model goes from evaluation to training
    or back, as a frozen normalisation does that is trained later. One that begins to change by itself is noticed before
    the next evaluation, comparison or save.

    Each rank has moved them by its own samples. The mean is what their averages over all samples are; counts take the
    largest. Then all ranks are equal at the end of every step, and it matters not at which step a run is saved. Once
    it is known which they are, they travel beside the gradients of every step.

    A step that does not count leaves them as they were: running statistics would stay nan for good. Where ranks train
    apart (`--comm.sync local`) that is each one's own matter: they are averaged after it, where all are to be equal.

    Those that the model's `state_dict()` leaves out (`persistent=False`) are in a checkpoint by this: a run that goes
    on would begin with what the model was built with.
    """

    name = "buffers"

    def __init__(self, job: Job) -> None:
        self._job = job
        self._world = job.world
        self._log = job.log
        self.names: list[str] | None = None
        """Of the buffers that change; None before the first step."""
        self._model: nn.Module | None = None
        self._before: dict[str, Tensor] = {}
        self._modes: list[bool] = []
        """Which modules were in training mode when that was found out."""
        self._has_begun = False
        """A step has been computed: a run that goes on may be evaluated before, when nothing has changed yet."""
        self._kept: dict[str, Tensor] = {}
        """What the buffers were after the last step that counts."""
        self._beside = BesideGradients(job.world, "buffers", lambda: self._named(self.names or []))

    def attach(self, training: Training) -> None:
        """Have the buffers go along with the gradients, where the ranks average these."""
        training.optimizer.take_along(self._beside)

    def begin(self, model: nn.Module) -> None:
        """Remember what the buffers hold: what has changed them so far does not count."""
        self._model, self._before = model, _digests(model)
        self._kept = {name: buffer.clone() for name, buffer in model.named_buffers() if name in self._before}

    def after_backward(self, training: Training, step: Step) -> None:
        """Average, where a step counts on all ranks or on none; else find out which they are, if that is not known."""
        self._has_begun = True
        if training.strategy.agrees:
            self.average(self._world)
        elif self._has_buffers():
            self._find_out(self._world)

    def after_update(self, training: Training, step: Step) -> None:
        """Undo what a step has done that does not count; average what other ranks' steps have left."""
        if self.names is not None and (self.names or self._kept):
            self._undo(self.names, training.model, step)
        if not training.strategy.agrees and training.strategy.is_equal_after(step.number):
            self.average(self._world)
            self.keep()

    @torch.no_grad()
    def _undo(self, names: list[str], model: nn.Module, step: Step) -> None:
        buffers = dict(model.named_buffers())
        kept = {name: self._kept[name] for name in names if name in self._kept and name in buffers}
        unseen: list[tuple[Tensor, Tensor]] = []
        for name, before in kept.items():
            if before.shape != buffers[name].shape:  # a memory that grows
                if not step.is_finite:
                    _set_buffer(model, name, before.clone())
                kept[name] = model.get_buffer(name).clone()
                continue
            if not self._world.reads_at_once:
                unseen.append((buffers[name], before))
                continue
            if not step.is_finite:
                buffers[name].copy_(before)
            before.copy_(buffers[name])
        _settle_unseen(unseen, step.is_finite)
        # One that has begun to change is kept from now on.
        self._kept = {**kept, **{name: buffers[name].clone() for name in names if name not in kept}}

    def before_looking(self, training: Training) -> None:
        """Take in the buffers that have begun to change since the first step, and average them."""
        if self._world.size == 1 or self.names is None or not training.strategy.is_equal_after(training.step):
            return
        before = self.names
        self.names = self._changed(self._world)
        late = [name for name in self.names if name not in before]
        if late:
            self._log.say(
                f"buffers:    {', '.join(late[:3])}{', ...' * (len(late) > 3)} changed for the first time by step"
                f" {training.step}: averaged over the ranks from now on, as others are (keep_per_rank leaves one alone)"
            )
            self._average(self._world, late)

    def keep(self) -> None:
        """Take what the buffers hold now for what the last step that counts has left."""
        assert self._model is not None
        buffers = dict(self._model.named_buffers())
        self._kept = {name: buffers[name].clone() for name in self._kept if name in buffers}

    def average(self, world: World) -> None:
        """Make changed buffers equal on all ranks, by one all-reduce a kind. Collective."""
        if not self._has_buffers():
            return
        has_arrived, is_new = self._beside.has_arrived(), self._find_out(world)
        if world.size > 1 and (is_new or not has_arrived):
            self._average(world, self.names or [])

    def average_for_a_look(self, world: World) -> None:
        """Average what has changed so far. Before the first step nothing is found out by that. Collective."""
        self.average(world)
        if not self._has_begun:
            self._modes = []

    def _has_buffers(self) -> bool:
        model = self._model
        return model is not None and has_buffers(model) and next(model.buffers(), None) is not None

    def _find_out(self, world: World) -> bool:
        """Find out which buffers change where modules were not in these modes before; returns whether. Collective."""
        assert self._model is not None
        modes = [module.training for module in self._model.modules()]
        if self.names is not None and modes == self._modes:
            return False
        self.names, self._modes = self._changed(world), modes
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the buffers that a step changes and the model's own state leaves out, where ranks agree on them."""
        strategy = self._job.strategy
        if self._model is None or not (strategy.agrees or strategy.is_made_equal):
            return {}
        own, buffers = _left_out(self._model), dict(self._model.named_buffers())
        if any(is_fake(buffer) for buffer in buffers.values()):  # of a dry run: what a step changes is not known
            return {}
        now = {name: digest_of(buffers[name]) for name in own if name in buffers}
        changed = [name for name, digest in now.items() if not digest.equal(self._before.get(name, ~digest))]
        return {"left_out": {name: buffers[name] for name in changed}} if changed else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up again."""
        assert self._model is not None
        buffers = dict(self._model.named_buffers(remove_duplicate=False))
        for name, saved in state["left_out"].items():
            device = buffers[name].device if name in buffers else self._world.device
            _set_buffer(self._model, name, saved.to(device, copy=True))
            self._kept[name] = saved.to(device, copy=True)

    def _changed(self, world: World) -> list[str]:
        """Return the names of the buffers that have changed on any rank since training began. Collective.

        One that a step has changed is among them also where that step did not count, and it is as it was.
        """
        assert self._model is not None
        now = _digests(self._model)
        changed = [name for name, digest in now.items() if not digest.equal(self._before.get(name, ~digest))]
        everyone = world.all_gather_object(changed, "buffers.changed")
        known = {*(self.names or ()), *(name for names in everyone for name in names)}
        return [name for name in now if name in known]

    def _average(self, world: World, names: list[str]) -> None:
        world.average_tensors(self._named(names), "buffers")

    def _named(self, names: list[str]) -> list[Tensor]:
        if not names:
            return []
        assert self._model is not None
        buffers = dict(self._model.named_buffers())
        return [buffers[name] for name in names]


def _settle_unseen(pairs: list[tuple[Tensor, Tensor]], is_counted: Tensor) -> None:
    """Have buffers, and what is kept of each, hold what they do where a step counts, else what was kept.

    Without a look at that, and by a few kernels for all small buffers of one type: a network has hundreds of them.
    """
    kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for place, (buffer, kept) in enumerate(pairs):
        is_small = buffer.numel() <= _SMALL and buffer.device == kept.device
        kinds.setdefault((buffer.dtype, buffer.device) if is_small else place, []).append((buffer, kept))
    for alike in kinds.values():
        buffers, kept_of = (list(side) for side in zip(*alike, strict=True))
        now, before = (torch.cat([tensor.reshape(-1) for tensor in side]) for side in (buffers, kept_of))
        settled = torch.split(torch.where(is_counted, now, before), [buffer.numel() for buffer in buffers])
        parts = [part.view(buffer.shape) for part, buffer in zip(settled, buffers, strict=True)]
        copy_all_(buffers, parts)
        copy_all_(kept_of, parts)


def _digests(model: nn.Module) -> dict[str, Tensor]:
    """Return what changes when a buffer does; its version counter does not tell: batch_norm leaves it alone."""
    own = per_rank_buffers(model)
    return {name: digest_of(buffer) for name, buffer in model.named_buffers() if name not in own}


def _left_out(model: nn.Module) -> set[str]:
    """Return the names of the buffers that are no part of the model's state, those of a rank's own aside."""
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
        if not is_saved_buffer(module, name)
    }
    return names - per_rank_buffers(model)


def _set_buffer(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a buffer, of whatever shape."""
    prefix, _, own = name.rpartition(".")
    setattr(model.get_submodule(prefix), own, tensor)
