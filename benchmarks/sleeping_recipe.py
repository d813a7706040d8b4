"""A recipe whose layers sleep instead of computing, for benchmarks with more hosts than cores.

Each layer has `--layer-kib` of weights and sleeps for `--sleep-ms` in its forward pass and twice that in its backward
pass, after which its gradient, random numbers in a matrix, is ready: as long as a real layer takes on a machine that
this one does not have.
"""

import dataclasses
import time

import torch

import hvdtrain


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, seconds, gradient):
        time.sleep(seconds)
        ctx.gradient, ctx.seconds = gradient, seconds
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(2 * ctx.seconds)
        return gradient, ctx.gradient * gradient.sum(), None, None


class _Layer(torch.nn.Module):
    def __init__(self, kib, seconds):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(kib, 256))
        self.seconds = seconds
        gradient = torch.randn(kib, 256, generator=torch.Generator().manual_seed(kib))
        self.register_buffer("gradient", gradient, persistent=False)

    def forward(self, x):
        return _Sleep.apply(x, self.weight, self.seconds, self.gradient)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sleeping(hvdtrain.Recipe):
    """Layers that sleep."""

    layers: int = 8
    """How many."""
    layer_kib: int = 1024
    """Weights of a layer."""
    sleep_ms: float = 20.0
    """Of a layer's forward pass; its backward pass takes twice as long."""

    def build(self, say):
        """Return the task."""
        seconds = self.sleep_ms / 1e3
        model = torch.nn.Sequential(
            *[_Layer(self.layer_kib, seconds) for _ in range(self.layers)], torch.nn.Linear(4, 1)
        )
        data = hvdtrain.TensorSamples(torch.ones(4096, 4), torch.zeros(4096, 1))
        few = hvdtrain.TensorSamples(torch.ones(2, 4), torch.zeros(2, 1))
        return hvdtrain.Task(
            model=model,
            train_data=data,
            val_data=few,
            loss_sums=lambda model, batch: {"loss": (model(batch[0]) - batch[1]).square().sum()},
        )


def recipe():
    """Return the settings."""
    return Sleeping(
        train=hvdtrain.TrainConfig(steps=20, micro_batch_size=1, accum_steps=1, max_grad_norm=None),
        optim=hvdtrain.OptimConfig(name="sgd", peak_lr=1e-6, schedule="constant"),
        log=hvdtrain.LogConfig(every=4),
        comm=hvdtrain.CommConfig(bucket_mib=2),
    )
