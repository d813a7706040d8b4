"""Tensors that are handed over to Horovod's thread, and what waits until they come back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from hvdtrain.errors import UsageError, one_line
from hvdtrain.process.progress import Progress
from hvdtrain.world.streams import keep_for_stream


def hand_over(
    begin: Callable[[Tensor], Any], tensor: Tensor, name: str, progress: Progress, in_place: bool = False
) -> Callable[[], Tensor]:
    """Hand a tensor over by one of Horovod's functions; returns what waits for the result.

    Horovod's thread is not in inference mode, and may not write into a tensor that was made there: a copy goes.

    Args:
        begin: returns a handle.
        tensor: what it takes.
        name: of the collective.
        progress: where this rank is.
        in_place: the tensor becomes the result.

    Raises:
        UsageError: a collective of this name is on its way.
    """
    with outside_of_inference_mode():
        own = tensor.clone() if in_place and tensor.is_inference() else tensor
        try:
            handle = begin(own)
        except ValueError as error:
            if "same name" not in str(error):
                raise
            raise UsageError(
                f"'{name}' is on its way already: wait for its result first, or give each collective a name of its own"
            ) from error
    wait = Waiting(progress, handle, name)
    return wait if own is tensor else lambda: _write_back(wait(), tensor)


def outside_of_inference_mode() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which tensors are made that any thread may write into."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def _write_back(result: Tensor, target: Tensor) -> Tensor:
    with torch.inference_mode():
        return target.copy_(result)


def explained(error: HorovodInternalError, name: str) -> Exception:
    """Return what to raise for an error of Horovod's: where ranks came with different things, what they must do."""
    if not str(error).startswith("Mismatched"):
        return cast(Exception, error)
    if name.startswith("gradients."):
        advice = "Freeze, unfreeze and add the same layers on all ranks, at the same step"
    else:
        advice = "Give tensors of one shape and type, and the same arguments, on every rank, in calls of the same order"
    return UsageError(f"'{name}' is not alike on all ranks: {one_line(error)} {advice}")


class Waiting:
    """What waits for a collective when it is called; `is_done` tells, without waiting, whether it need not."""

    def __init__(self, progress: Progress, handle: Any, name: str) -> None:
        self._progress, self._handle, self._name = progress, handle, name

    def __call__(self) -> Tensor:
        """Return the result, when it is there."""
        with self._progress.during("communication"):
            try:
                result = hvd.synchronize(self._handle)
            except HorovodInternalError as error:
                raise explained(error, self._name) from error
        keep_for_stream(result)
        return cast(Tensor, result)

    def is_done(self) -> bool:
        """Any thread may ask."""
        try:
            return bool(hvd.poll(self._handle))
        except (ValueError, RuntimeError):  # its result was fetched meanwhile
            return True
