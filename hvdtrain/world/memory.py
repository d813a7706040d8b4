"""What a codec remembers of tensors between steps, and may have to forget again where a step is skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class Memory:
    """Tensors by name. What was put in since the last `settle` can be taken back."""

    def __init__(self) -> None:
        self._now: dict[str, Tensor] = {}
        self._before: dict[str, Tensor | None] = {}
        """What there was before the step that is not settled yet."""

    def get(self, name: str, like: Tensor) -> Tensor | None:
        """Return what is kept, in the type and on the device of `like`; None where nothing of its shape is.

        What a checkpoint had lies in host memory: from now on it is kept where it is used.
        """
        kept = self._now.get(name)
        if kept is None or kept.shape != like.shape:
            return None
        kept = self._now[name] = kept.to(like.device, like.dtype)
        return kept

    def put(self, name: str, fresh: Tensor, is_good: bool | Tensor) -> None:
        """Keep `fresh` where it is good, what there was before where it is not; a tensor is not looked at."""
        old = self._now.get(name)
        self._before.setdefault(name, old)
        if isinstance(is_good, Tensor):
            self._now[name] = torch.where(is_good, fresh, 0.0 if old is None or old.shape != fresh.shape else old)
        elif is_good:
            self._now[name] = fresh

    def settle(self, skipped: bool | Tensor) -> None:
        """Let what was put in stay, or take it back."""
        if isinstance(skipped, Tensor):
            for name, old in self._before.items():
                fresh = self._now.get(name)
                if fresh is not None:
                    then = torch.zeros_like(fresh) if old is None or old.shape != fresh.shape else old
                    self._now[name] = torch.where(skipped > 0, then, fresh)
        elif skipped:
            self._now = self._settled()
        self._before.clear()

    def _settled(self) -> dict[str, Tensor]:
        old = {**self._now, **self._before}
        return {name: tensor for name, tensor in old.items() if tensor is not None}

    def now(self) -> dict[str, Tensor]:
        """Return what is kept now, a step that is not settled included."""
        return dict(self._now)

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of what is kept, without a step that is not settled."""
        return {name: tensor.detach().clone() for name, tensor in self._settled().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Keep these and nothing else."""
        self._now, self._before = dict(state), {}


def merged(states: Iterable[Mapping[str, Tensor]], size: int) -> dict[str, Tensor]:
    """Return what each of `size` ranks keeps so that the sum over them is that of `states`."""
    total: dict[str, Tensor] = {}
    for state in states:
        for name, tensor in state.items():
            total[name] = total[name] + tensor if name in total else tensor
    return {name: tensor / size for name, tensor in total.items()}
