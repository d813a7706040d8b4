"""The textbook's network on tensors in memory, as a recipe: what overhead.py measures hvdtrain by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvdtrain import LogConfig, Recipe, SgdConfig, Task, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH, WINDOW = 64, 100  # samples of a rank; steps whose mean is one measurement
LR = 0.01


def samples() -> tuple[Tensor, Tensor]:
    """Return inputs, fp32 `(n, 784)`, and classes, int64 `(n,)`: random, the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(12_800, 784, generator=generator), torch.randint(0, 10, (12_800,), generator=generator)


@dataclass(frozen=True, kw_only=True)
class Overhead(Recipe):
    """A network so small that a step is mostly what surrounds it."""

    def build(self, say: Callable[[str], None]) -> Task:
        """Make the samples and the network."""
        from hvdtrain.data.dataset import TensorSamples
        from hvdtrain.models.mlp import Mlp

        x, y = samples()
        return Task(
            model=Mlp(),
            train_data=TensorSamples(x, y),
            val_data=TensorSamples(x[:BATCH], y[:BATCH]),
            loss_sums=_loss,
        )


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    import torch.nn.functional as F

    return {"loss": F.nll_loss(model(batch[0]), batch[1], reduction="sum")}


def recipe() -> Overhead:
    """Return plain SGD, a batch of 64 on each rank."""
    return Overhead(
        train=TrainConfig(steps=2000, micro_batch_size=BATCH, accum_steps=1, max_grad_norm=None),
        optim=SgdConfig(peak_lr=LR, schedule="constant", weight_decay=0.0),
        log=LogConfig(every=WINDOW),
    )
