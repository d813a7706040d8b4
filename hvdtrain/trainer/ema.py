"""`--train.ema`: an exponential moving average of the weights, which is evaluated, saved and exported.

After each update, average <- decay x average + (1 - decay) x weights (Polyak and Juditsky 1992; for deep networks
arXiv:1512.00567, section 8). The first update sets the average to the weights, as torch's `AveragedModel` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.models.weights import has_plain_state, model_weights
from hvdtrain.trainer.component import Component, Step
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.model import wide_type

if TYPE_CHECKING:
    from hvdtrain.trainer.state import Training


class WeightAverage(Component):
    """Averages parameters and buffers of real numbers, in fp32 or wider; other buffers stay the model's own.

    Every rank computes it from weights that are equal, so it is equal on all, whatever their number.
    """

    name = "ema"

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._weights: dict[str, Tensor] = {}
        self._num_updates = torch.zeros(())
        self.about = (
            f"average:    held-out figures and exports are of the weights' moving average (--train.ema {decay:g})"
        )

    @classmethod
    def of(cls, job: Job) -> WeightAverage | None:
        """Return one where `--train.ema` is given."""
        return None if job.config.train.ema is None else cls(job.config.train.ema)

    def begin(self, model: nn.Module) -> None:
        """Begin with the weights as they are.

        Raises:
            ConfigError: the model's `state_dict()` is not that of its parameters and buffers alone.
        """
        if not has_plain_state(model):
            raise ConfigError(
                "--train.ema cannot average this model: its state_dict() renames or adds something (state-dict hooks,"
                " get_extra_state)"
            )
        self._weights = {name: tensor.to(wide_type(tensor.dtype), copy=True) for name, tensor in _real(model).items()}
        device = next((tensor.device for tensor in self._weights.values()), None)
        self._num_updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def after_update(self, training: Training, step: Step) -> None:
        """Move the average towards the weights, unless the step was skipped."""
        share = torch.where(self._num_updates == 0, 1.0, 1.0 - self._decay).double()
        share = share.where(step.is_finite, 0.0)
        shares = {dtype: share.to(dtype) for dtype in {average.dtype for average in self._weights.values()}}
        for name, tensor in _real(training.model).items():
            average = self._weights.get(name)
            if average is None:  # it has come up while training: `check_storable` says what to do
                continue
            average.lerp_(tensor.to(average.dtype), shares[average.dtype])
        self._num_updates += step.is_finite

    def evaluated_weights(self) -> Mapping[str, Tensor]:
        """Return the average."""
        return self._weights

    def state_dict(self) -> dict[str, Any]:
        """Return the average and how many steps are in it."""
        return {"weights": self._weights, "num_updates": self._num_updates, "decay": self._decay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved average."""
        for name, average in self._weights.items():
            average.copy_(state["weights"][name])
        self._num_updates.copy_(state["num_updates"])


def _real(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model_weights(model).items() if tensor.is_floating_point()}
