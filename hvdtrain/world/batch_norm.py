"""Batch normalisation over the samples of all ranks. torch's own needs torch.distributed, Horovod's refuses CPUs."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdtrain.models.private_torch import BatchNorm
from hvdtrain.world.differentiable import summed
from hvdtrain.world.world import World


class SyncBatchNorm(BatchNorm):
    """Normalises by mean and variance over the samples of all ranks; running statistics are then equal everywhere.

    In training mode every rank must run it equally often (a rank without samples, with an empty batch). Collective.
    Parameters and buffers have the names and shapes of `nn.BatchNorm2d`.

    Args:
        like: the layer that it replaces; parameters and buffers are taken over.
        world: the ranks.
        name: of the layer, alike on all ranks.
    """

    def __init__(self, like: BatchNorm, world: World, name: str) -> None:
        super().__init__(like.num_features, like.eps, like.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = like.affine, like.track_running_stats
        self.weight, self.bias = like.weight, like.bias
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self, buffer, getattr(like, buffer))
        self.training = like.training
        self._world = world
        self._name = f"batch_norm.{name}"

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """Copy all but the ranks."""
        memo[id(self._world)] = self._world
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation needs (n, C, ...), not {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `(n, C, ...)`."""
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        x = input if input.dtype == torch.float64 else input.float()
        mean, variance, count = _Moments.apply(x, self._world, self._name)  # type: ignore[no-untyped-call]
        if self.training and self.running_mean is not None:
            if input.is_cuda:
                self._track_unseen(mean.detach(), variance.detach(), count)
            else:
                self._track(mean.detach(), variance.detach(), float(count))
        shape = (1, -1, *[1] * (input.dim() - 2))
        normal = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return cast(Tensor, normal.to(input.dtype))

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """Move the running statistics, with the unbiased variance, as `nn.BatchNorm2d` does."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        if count == 0:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)

    @torch.no_grad()
    def _track_unseen(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Do the same without a look at the count, for which a GPU would have to be waited for in each layer."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        is_counted = count > 0
        self.num_batches_tracked.add_(is_counted)
        share = 1 / self.num_batches_tracked.clamp(min=1).double() if self.momentum is None else self.momentum
        share = share * is_counted.double()
        unbiased = variance.double() * (count / (count - 1).clamp(min=1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            known = torch.where(is_counted, new.to(running.dtype), running)  # of no samples it is no number
            running.lerp_(known, share.to(running.dtype))


class _Moments(torch.autograd.Function):
    """Mean, biased variance `(C,)` and count over the samples of all ranks; the gradient passes through all of them."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, world: World, name: str) -> tuple[Tensor, Tensor, Tensor]:
        ctx.world, ctx.name = world, name
        dims = [0, *range(2, input.dim())]
        number = input.numel() // input.shape[1]
        local = _sums_of_moments(input, dims, number) if input.is_cuda else _sums_in_fp64(input, dims, number)
        total, squares, count = _split(world.all_reduce(local, "sum", f"{name}.forward"))
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        ctx.save_for_backward(input, mean, count)
        ctx.mark_non_differentiable(count)
        return mean.to(input.dtype), variance.to(input.dtype), count

    @staticmethod
    def backward(ctx: Any, d_mean: Tensor, d_variance: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        input, mean, count = ctx.saved_tensors
        # Each rank's loss depends on every rank's samples: the sum of the ranks' derivatives reaches all of them.
        local = torch.cat((d_mean.double(), d_variance.double()))
        d_mean, d_variance = summed(local, ctx.world, f"{ctx.name}.backward").chunk(2)
        shape = (1, -1, *[1] * (input.dim() - 2))
        if torch.is_grad_enabled():  # to be differentiated again, as for a gradient penalty: the mean depends on inputs
            dims = [0, *range(2, input.dim())]
            mean = summed(input.double().sum(dims), ctx.world, f"{ctx.name}.mean") / count
        if input.is_cuda:  # whose fp64 is slow: what is large is passed over as it is
            slope, offset = 2 * d_variance / count, d_mean / count
            centred = input - mean.to(input.dtype).view(shape)
            return centred * slope.to(input.dtype).view(shape) + offset.to(input.dtype).view(shape), None, None
        centred = input.double() - mean.view(shape)
        gradient = (d_mean.view(shape) + 2 * d_variance.view(shape) * centred) / count
        return gradient.to(input.dtype), None, None


def _sums_in_fp64(input: Tensor, dims: list[int], number: int) -> Tensor:
    """Return sums and sums of squares, `(C,)` each, and the number.

    In fp64: the second moment loses what the mean is large in.
    """
    values = input.detach().double()
    return torch.cat((values.sum(dims), values.square().sum(dims), values.new_tensor([float(number)])))


def _sums_of_moments(input: Tensor, dims: list[int], number: int) -> Tensor:
    """Return the same of mean and variance, which torch finds together, in the type of the input, without that loss."""
    total = torch.full((1,), float(number), dtype=torch.float64, device=input.device)
    if number == 0:
        return torch.cat((total.new_zeros(2 * input.shape[1]), total))
    variance, mean = torch.var_mean(input.detach(), dims, correction=0)
    mean = mean.double()
    return torch.cat((mean * number, (variance.double() + mean.square()) * number, total))


def _split(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    channels = (len(sums) - 1) // 2
    return sums[:channels], sums[channels:-1], sums[-1]


def synchronize_batch_norm(model: nn.Module, world: World) -> nn.Module:
    """Replace every `nn.BatchNorm` layer in place by one over all ranks; returns the model."""
    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNorm) and not isinstance(child, SyncBatchNorm):
                setattr(parent, name, SyncBatchNorm(child, world, f"{prefix}.{name}"))
    return SyncBatchNorm(model, world, "model") if isinstance(model, BatchNorm) else model


def has_synchronized_layers(model: nn.Module) -> bool:
    """Return whether ranks must run this model in step with each other."""
    return any(isinstance(module, SyncBatchNorm) for module in model.modules())
