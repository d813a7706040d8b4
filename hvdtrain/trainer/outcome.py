"""Whether a step counts, and its gradient's norm, on their way to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Outcome:
    """What became of a step: known at once in host memory; on a GPU it arrives there while the next one is computed.

    Args:
        is_counted: bool, a scalar on the device.
        norm: of the averaged gradient, a scalar on the device.
        at_once: reading a tensor's value waits for nothing.
    """

    def __init__(self, is_counted: Tensor, norm: Tensor, at_once: bool) -> None:
        self._known: tuple[bool, float] | None = None
        self._arrived: torch.cuda.Event | None = None
        if at_once:
            self._known = bool(is_counted), norm.item()
            return
        self._sent = torch.stack([is_counted.to(norm.dtype), norm])
        if self._sent.is_cuda:
            self._sent, self._arrived = self._sent.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> tuple[bool, float]:
        """Return whether the step counts, and the norm; waits until both have arrived."""
        if self._known is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            is_counted, norm = self._sent.tolist()
            self._known = bool(is_counted), norm
        return self._known
