"""`DistributedOptimizer` and what Horovod's scripts call around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.compat.place import check_process_set, global_process_set, world
from hvdtrain.compat.reductions import Average, Compression, Compressor, word_of
from hvdtrain.errors import UsageError
from hvdtrain.models.private_torch import BatchNorm
from hvdtrain.models.walk import owned_by
from hvdtrain.world import Averaging, World, WrappedOptimizer, codec_of
from hvdtrain.world.batch_norm import SyncBatchNorm as _SyncBatchNorm
from hvdtrain.world.codec import AsTheyAre, Codec, Fp16

_log = logging.getLogger("hvdtrain")


def DistributedOptimizer(  # noqa: N802  Horovod's name
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = global_process_set,
) -> WrappedOptimizer:
    """Have an optimizer average, or sum, its gradients over the ranks; see `World.wrap`. Collective.

    It is changed in place and returned. Gradients are averaged at the end of backward: clipping and loss scalers need
    neither `synchronize()` nor `skip_synchronize()`, which do no harm.

    Args:
        optimizer: any torch optimizer.
        named_parameters: names for messages; what has none is called by its place.
        compression: `Compression.none` or `Compression.fp16`.
        backward_passes_per_step: that are summed before they are averaged: divide the loss by them.
        op: Average, Sum or Adasum, which combines gradients, and not as Horovod does the updates that an optimizer has
            made of them: the same for plain SGD, and said.
        gradient_predivide_factor: without effect, which is said: each rank divides before the sum is taken.
        num_groups: without effect, which is said: gradients travel in buckets of a fixed layout.
        groups: as `num_groups`.
        sparse_as_dense: True: gradients of embeddings travel whole, as they do anyhow under optimizers for dense ones.
        process_set: the global one.

    Raises:
        UsageError: a format of one's own, a group of ranks, or another `op`.
        ConfigError: Adasum needs MPI, a power of two of ranks and uncompressed gradients.
    """
    check_process_set(process_set)
    word = word_of(op)
    if word not in ("mean", "sum", "adasum"):
        raise UsageError("DistributedOptimizer takes op=Average, Sum or Adasum")
    formats: dict[type[Compressor], str] = {Compression.none: "none", Compression.fp16: "fp16"}
    if compression not in formats:
        raise UsageError(
            f"{compression.__name__} is a format of one's own: derive it from hvdtrain.world.Codec and give it to"
            " hvdtrain.World.wrap(..., compression=...)"
        )
    if world().rank == 0:
        _say_what_has_no_effect(gradient_predivide_factor, num_groups, groups)
        if word == "adasum":
            _log.warning(
                "DistributedOptimizer(op=Adasum) combines the ranks' gradients, and Horovod the updates that the"
                " optimizer makes of them: with momentum, Adam and the like the weights are others than under Horovod"
            )
    codec: str | Codec = formats[compression]
    if word == "sum":
        codec = SummedFp16() if codec == "fp16" else Summed()
    averaging = Averaging(
        accum_steps=backward_passes_per_step,
        compression=codec_of(codec) if isinstance(codec, str) else codec,
        op="adasum" if word == "adasum" else "average",
    )
    return world().wrap(optimizer, _Named(optimizer, named_parameters), averaging)


def _say_what_has_no_effect(factor: float, num_groups: int, groups: Any) -> None:
    named = [("gradient_predivide_factor", factor != 1.0), ("num_groups", num_groups != 0), ("groups", groups)]
    for name, is_given in named:
        if is_given:
            _log.warning(
                "DistributedOptimizer(%s=...) has no effect: each rank's gradients are divided before they are added,"
                " and travel in buckets of a fixed layout",
                name,
            )


class Summed(AsTheyAre):
    """Gradients in their own type, added instead of averaged."""

    def start(self, world: World, prefix: str, name: str, part: Tensor) -> Callable[[], Tensor]:
        """Undo the division by the ranks when the mean is there."""
        wait = super().start(world, prefix, name, part)
        return lambda: wait().mul_(world.size)


class SummedFp16(Fp16):
    """Gradients as fp16, added instead of averaged."""

    def start(self, world: World, prefix: str, name: str, part: Tensor) -> Callable[[], Tensor]:
        """Undo the division by the ranks when the mean is there."""
        wait = super().start(world, prefix, name, part)
        return lambda: wait().mul_(world.size)


class _Named(nn.Module):
    """Stands for the model, of which a script shows no more than its parameters."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]] | None
    ) -> None:
        super().__init__()
        self._pairs = list(named_parameters or ())
        self._is_sparse = isinstance(optimizer, torch.optim.SparseAdam)  # which takes no others
        self._owned = owned_by(optimizer)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._pairs

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        for parameter in self._owned if self._is_sparse else ():
            table = nn.Embedding(1, 1, sparse=True)
            table.weight = parameter
            yield table


def broadcast_parameters(params: Mapping[str, Any] | Iterable[tuple[str, Any]], root_rank: int) -> None:
    """Overwrite every rank's tensors with those of rank `root_rank`. Collective.

    Args:
        params: a state dictionary, or pairs of name and tensor; what is no tensor is left alone.
        root_rank: whose.

    Raises:
        UsageError: it is neither.
    """
    if not isinstance(params, Mapping | Iterable):
        raise UsageError("broadcast_parameters takes model.state_dict() or model.named_parameters()")
    pairs = params.items() if isinstance(params, Mapping) else params
    tensors = {name: tensor for name, tensor in pairs if isinstance(tensor, Tensor)}
    world().broadcast_tensors(tensors, "parameters", root_rank)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int, model: nn.Module | None = None) -> None:
    """Make every rank's optimizer state that of rank `root_rank`; a fresh optimizer takes no step. Collective."""
    world().broadcast_optimizer(optimizer, root_rank)


class SyncBatchNorm(_SyncBatchNorm):
    """Batch normalisation over the samples of all ranks, for inputs of any number of dimensions, on CPUs too.

    Make all such layers in the same order on every rank, after `init`. Collective when it runs.
    """

    _count = 0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        SyncBatchNorm._count += 1
        like: BatchNorm = nn.BatchNorm1d(num_features, eps, momentum, affine, track_running_stats)
        super().__init__(like, world(), f"compat.{SyncBatchNorm._count}")
