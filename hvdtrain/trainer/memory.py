"""How much memory a run needs on each rank, and what it sends: found out without allocating any of it.

Model, optimizer and one micro-batch, forward and backward, are run on fake tensors (torch's `FakeTensorMode`): shapes
and types are real, storage there is none. What lives at the end of the forward pass is what the backward pass needs;
what lives at most, such as a loss's logits on the way, is the peak.

What CUDA and NCCL take is not part of it: that has been taken by the time when the free memory is asked for
(`world/first_contact.py`).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.compilation import uncompiled
from hvdtrain.models.private_torch import FakeTensorMode, LiveBytes
from hvdtrain.optim.groups import trainable, trainable_by_name
from hvdtrain.settings.units import in_units
from hvdtrain.trainer.bucket_order import gradients_are_views
from hvdtrain.trainer.component import nested_tensors
from hvdtrain.trainer.components import build_components
from hvdtrain.trainer.contract import checked_optimizer
from hvdtrain.trainer.fakes import fake_micro_batch, fake_model, plain_settings
from hvdtrain.trainer.free_memory import available, in_host_memory
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.model import own_type
from hvdtrain.trainer.sharded_memory import most_at_once, sharded_shares
from hvdtrain.trainer.step import forward_batch
from hvdtrain.world import codec_for

# What libraries, the CUDA context, kernels' scratch space and fragmentation take besides, as a share.
RESERVE = 0.1
# Weights below this are taken to fit.
_LARGE_BYTES = 64 << 20
# Tensors of fewer elements are counters.
_SMALL = 64


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank needs, by what they are for."""

    weights: int
    gradients: int
    """Those that backward writes and, between several ranks, the buckets that are sent and what is not sent yet."""
    optimizer: int
    """The optimizer's state, and components' such as a moving average of the weights."""
    activations: int | None
    """What one micro-batch keeps for its backward pass; None: the model cannot be run on fake tensors."""
    micro_batch_size: int
    transients: int = 0
    """What comes and goes while a micro-batch is computed, at the most: of the loss, and of backward."""
    host: int = 0
    """Of the optimizer's state, in host memory: `optimizer` then has what is brought to the device at once."""

    @property
    def of_micro_batch(self) -> int | None:
        """Return what grows with the micro-batch."""
        return None if self.activations is None else self.activations + self.transients

    @property
    def fixed(self) -> int:
        """Return what is needed whatever the micro-batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Return all that is known."""
        return self.fixed + (self.of_micro_batch or 0)

    def __str__(self) -> str:
        parts = [("weights", self.weights), ("gradients", self.gradients), ("optimizer", self.optimizer)]
        known = [f"{name} {in_units(value)}" for name, value in parts]
        known.append("activations unknown" if self.activations is None else f"activations {in_units(self.activations)}")
        known += [f"on the way {in_units(self.transients)}"] if self.transients else []
        beside = f"; in host memory {in_units(self.host)} of the optimizer's state" if self.host else ""
        return f"{in_units(self.total)} a rank: {', '.join(known)}{beside}"


def is_large(job: Job) -> bool:
    """Return whether there are so many weights that it is looked whether they fit."""
    return sum(parameter.nbytes for parameter in job.task.model.parameters()) > _LARGE_BYTES


def with_flops_if_large(job: Job) -> Job:
    """Return the job with its model's operations counted, where that is asked for or takes little beside a step."""
    if not is_large(job) and job.config.log.peak_tflops is None:  # running a model on fake tensors has its price
        return job
    from hvdtrain.trainer.flops import with_flops  # and torch's counter, and its compiler, which others do not need

    return with_flops(job)


def checked_estimate(job: Job) -> Memory:
    """Return what a rank needs; looking takes about a second.

    Raises:
        ConfigError: more than there is, and `--health.memory-check` is on.
    """
    memory = estimate(job)
    if job.config.health.memory_check:
        check_fits(job, memory)
    return memory


def estimate(job: Job, all_trained: bool = False) -> Memory:
    """Return what a rank needs; model and optimizer are not touched, and no memory is allocated for them.

    Args:
        job: what is trained.
        all_trained: as if no parameter was frozen.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model(job, mode, all_trained)
    with mode:
        weights = tensor_bytes([*model.parameters(), *model.buffers()])
    activations, peak = _traced(job, model, mode)
    gradients = tensor_bytes([parameter for parameter in model.parameters() if parameter.requires_grad])
    transients = max(0, peak - (activations or 0) - gradients)
    of_each = optimizer_bytes(job, model)
    kept, host = sum(of_each.values()), 0
    at_once = most_at_once([parameter.nbytes for parameter in of_each], [*of_each.values()])
    if job.config.optim.shard and job.world.size > 1:
        shares = sharded_shares(job, job.task.build_optimizer(plain_settings(job.config).optim, model), model)
        gradients += shares.wire_bytes
        kept, at_once = shares.most_of(of_each), shares.most_at_once(of_each)
    elif job.world.size > 1:
        gradients += _sent_bytes(job, all_trained)
        gradients += _kept_bytes(job, all_trained)
    if job.is_offloaded:
        kept, host = at_once, kept
    kept += component_bytes(job, model, mode)
    return Memory(weights, gradients, kept, activations, job.plan.micro_batch_size, transients, host)


def wire_bytes(job: Job, all_trained: bool = False) -> int:
    """Return the bytes of all gradients as they are sent; `all_trained` as for `estimate`."""
    codec = codec_for(job.config.comm, job.task.model)

    def count(name: str, shape: torch.Size, dtype: torch.dtype) -> int:
        is_native = codec.is_native(job.world, dtype)
        return shape.numel() * dtype.itemsize if is_native else codec.bytes_of(name, shape, dtype)

    return _of_gradients(job, count, all_trained)


def _kept_bytes(job: Job, all_trained: bool) -> int:
    """Return what the codec remembers."""
    codec = codec_for(job.config.comm, job.task.model)

    def count(name: str, shape: torch.Size, dtype: torch.dtype) -> int:
        return 0 if codec.is_exact(name) else codec.kept_bytes(shape, dtype)

    return _of_gradients(job, count, all_trained)


def _sent_bytes(job: Job, all_trained: bool) -> int:
    """Return what sending takes besides gradients: all of the buffers, or what of them is there twice at a time."""
    whole, unsent = wire_bytes(job, all_trained), _of_gradients(job, _plain_bytes, all_trained)
    if not gradients_are_views(job) or whole != unsent:  # what travels in a type of its own is there twice
        return whole
    largest = max((parameter.nbytes for parameter in trainable(job.task.model)), default=0)
    return min(whole, max(largest, job.config.comm.bucket_mib << 20))


def _plain_bytes(name: str, shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * dtype.itemsize


def _of_gradients(job: Job, count: Callable[[str, torch.Size, torch.dtype], int], all_trained: bool) -> int:
    """Return the sum of what a codec counts for each gradient."""
    own = own_type(job.config.train.precision)
    return sum(
        count(name, parameter.shape, own or parameter.dtype)
        for name, parameter in trainable_by_name(job.task.model).items()
        if parameter.requires_grad or all_trained
    )


def check_fits(job: Job, memory: Memory) -> None:
    """Compare with the memory that there is.

    Raises:
        ConfigError: it is too little; names settings that need less.
    """
    _check_host(job, memory)
    free, what = available(job)
    if free is None or memory.total * (1 + RESERVE) <= free:
        return
    ways = []
    fixed = memory.fixed
    if memory.of_micro_batch is not None and fixed * (1 + RESERVE) < free:
        room = int((free / (1 + RESERVE) - fixed) // (memory.of_micro_batch / memory.micro_batch_size))
        if room >= 1:
            ways.append(f"--train.micro-batch-size {room} or fewer (the rest by accumulation)")
    if not job.config.model.checkpoint_blocks:
        ways.append("--model.checkpoint-blocks")
    if job.world.size > 1 and not job.config.optim.shard and memory.optimizer:
        ways.append("--optim.shard")
    if job.world.device.type != "cpu" and not job.is_offloaded and memory.optimizer:
        ways.append("--optim.offload cpu")
    if job.config.train.precision in ("fp32", "tf32", "fp64"):
        ways.append("--train.precision bf16")
    if job.config.train.precision != "bf16-true":
        ways.append("--train.precision bf16-true")
    raise ConfigError(
        f"training needs about {memory}, and {in_units(free)} {what}. What needs less: {', '.join(ways)},"
        f" fewer ranks a host or a smaller model; --health.no-memory-check tries it all the same"
    )


def _check_host(job: Job, memory: Memory) -> None:
    """Raise ConfigError where host memory is too small for what is kept there."""
    free, what = in_host_memory(job.world.local_size)
    if free is not None and memory.host > free:
        raise ConfigError(
            f"--optim.offload cpu keeps {in_units(memory.host)} a rank in host memory, and {in_units(free)} {what}:"
            " --optim.shard, fewer ranks a host or a smaller model need less; --health.no-memory-check tries it anyway"
        )


def optimizer_bytes(job: Job, model: nn.Module) -> dict[nn.Parameter, int]:
    """Return each parameter's state, from a step of it on parameters cut to at most three in each dimension."""
    small = {id(p): nn.Parameter(torch.ones([min(n, 3) for n in p.shape]), p.requires_grad) for p in model.parameters()}
    full: dict[Tensor, nn.Parameter] = {small[id(p)]: p for p in model.parameters()}
    memo: dict[int, Any] = {**small, **{id(buffer): buffer for buffer in model.buffers()}}
    cut = copy.deepcopy(model, memo)
    for parameter in cut.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer = checked_optimizer(job.task.build_optimizer(plain_settings(job.config).optim, cut), cut)
    optimizer.step()
    found: dict[nn.Parameter, int] = {}
    for cut_parameter, whole in full.items():
        total = 0
        for value in nested_tensors(optimizer.state.get(cut_parameter)).values():
            itemsize = (whole if value.dtype == cut_parameter.dtype else value).element_size()
            # A dimension as long as the cut parameter's has the length of the whole one's.
            shapes = zip(value.shape, cut_parameter.shape, whole.shape, strict=False)
            total += itemsize * math.prod(n if own == of_cut else own for own, of_cut, n in shapes)
        found[whole] = total
    return found


def component_bytes(job: Job, model: nn.Module, mode: FakeTensorMode) -> int:
    """Return the components' state, such as a moving average of the weights."""
    with mode:
        components = build_components(job)
        for component in components:
            component.begin(model)
        states = [component.state_dict() for component in components]
    return tensor_bytes([t for state in states for t in nested_tensors(state).values() if t.numel() > _SMALL])


def _traced(job: Job, model: nn.Module, mode: FakeTensorMode) -> tuple[int | None, int]:
    """Return the bytes that a micro-batch keeps for its backward pass, None where nobody can tell, and the peak.

    The peak is of all that lives in both passes but weights and inputs: gradients are part of it.
    """
    live = LiveBytes()
    activations = None
    with contextlib.suppress(Exception):  # whatever a user's model does that a fake tensor cannot
        batch = fake_micro_batch(job, mode)
        with uncompiled(), mode, live:
            sums = forward_batch(job, model, batch)
            activations = live.now
            sums["loss"].sum().backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None
    return activations, live.peak if activations is not None else 0


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the sum of their sizes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
