"""When this rank's collectives are under way: from the moment they are handed over until their result is there.

Horovod's own timeline does not serve: it must be switched on before Horovod starts (HOROVOD_TIMELINE=DYNAMIC), and from
then on its writer fills a core of rank 0 by looking for work (0.97 of a core, idle, in 0.28.1), in all steps; and it
knows nothing of other ranks but when they were ready.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hvdtrain.world.world import World

_STARTS = ("start_all_reduce_", "start_all_gather", "start_all_to_all", "start_broadcast_")
_SECONDS_BETWEEN_LOOKS = 0.0003


@dataclass
class Span:
    """A collective of this rank."""

    name: str
    kind: str
    """Such as "all_reduce"."""
    num_bytes: int
    started: int
    """By `time.perf_counter_ns`."""
    ended: int | None = None
    """On a GPU, where the host waits for no result, when it was handed to NCCL's stream."""
    is_on_gpu: bool = False


class CollectiveSpans:
    """Notes the collectives of a world, from `start` to `stop`; costs nothing before and afterwards.

    Where the back end can tell without waiting whether a result is there, a thread looks every 0.3 ms, and a span ends
    then; elsewhere it ends when somebody has waited for it.
    """

    def __init__(self, world: World) -> None:
        self.spans: list[Span] = []
        self._world = world
        self._open: list[tuple[Span, Callable[[], bool]]] = []
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to take notes."""
        for name in _STARTS:
            vars(self._world)[name] = self._noting(name, getattr(self._world, name))
        self._thread = threading.Thread(target=self._look, name="hvdtrain-spans", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; spans that are open end now."""
        for name in _STARTS:
            vars(self._world).pop(name, None)
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        now = time.perf_counter_ns()
        for span in self.spans:
            span.ended = span.ended or now

    def _noting(self, method: str, start: Callable[..., Callable[[], Tensor]]) -> Callable[..., Callable[[], Tensor]]:
        kind = method.removeprefix("start_").removesuffix("_")

        def noted(tensor: Tensor, *arguments: Any, **named: Any) -> Callable[[], Tensor]:
            texts = [value for value in (*arguments, *named.values()) if isinstance(value, str)]
            name, now = texts[-1] if texts else kind, time.perf_counter_ns()
            span = Span(name, kind, tensor.nbytes, now, is_on_gpu=tensor.is_cuda)
            wait = start(tensor, *arguments, **named)
            self.spans.append(span)
            is_done = getattr(wait, "is_done", None)
            if is_done is not None:
                self._open.append((span, is_done))

            def waited() -> Tensor:
                result = wait()
                span.ended = span.ended or time.perf_counter_ns()
                return result

            return waited

        return noted

    def _look(self) -> None:
        while not self._is_over.wait(_SECONDS_BETWEEN_LOOKS):
            for item in [*self._open]:
                span, is_done = item
                if span.ended is None and is_done():
                    span.ended = time.perf_counter_ns()
                if span.ended is not None:
                    self._open.remove(item)
