"""When a backward pass is over. Of `world/`, this file alone uses what is private in torch (seen in 2.6 and 2.13).

`torch.nn.parallel.DistributedDataParallel` and FSDP rely on the same callback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_engine: Any = torch.autograd.Variable._execution_engine
_C: Any = torch._C


class EndOfBackward:
    """Calls `action` when a backward pass is over, still inside `backward()`.

    A checkpoint with `use_reentrant=True` runs a backward pass inside the outer one, as a run of the engine of its own:
    the outer one's end is meant. May call `action` more than once for a pass.

    Args:
        action: what to do; what it raises, `backward()` raises.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._run = -1
        """The engine's run whose end is waited for."""

    def expect(self) -> None:
        """Wait for the end of the pass that runs now; call it from a hook, as often as you like."""
        run = _C._current_graph_task_id()
        if run != self._run:
            self._run = run
            _engine.queue_callback(self._at_end)

    def _at_end(self) -> None:
        # When a run is over, the node that is being computed is the one that has started it from within another run.
        outer = _C._current_autograd_node()
        if outer is None:
            self._action()
            return
        for following, _ in outer.next_functions:
            if following is not None:
                self._expect_once_reached(following)

    def _expect_once_reached(self, node: Any) -> None:
        def once(*gradients: Any) -> None:
            handle.remove()
            self.expect()

        handle = node.register_prehook(once)
