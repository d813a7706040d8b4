"""When a backward pass is over."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from hvdtrain.models.private_torch import backward_run, computed_node, outside_of_compilers, queue_after_run

if TYPE_CHECKING:
    from hvdtrain.world.exchange import GradientExchange


class EndOfBackward:
    """Calls `action` when a backward pass is over, still inside `backward()`.

    A checkpoint with `use_reentrant=True` runs a backward pass inside the outer one, as a run of the engine of its own:
    the outer one's end is meant. May call `action` more than once for a pass.

    Args:
        action: what to do; what it raises, `backward()` raises.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = outside_of_compilers(action)
        self._run = -1
        """The engine's run whose end is waited for."""

    def expect(self) -> None:
        """Wait for the end of the pass that runs now; call it from a hook, as often as you like."""
        run = backward_run()
        if run != self._run:
            self._run = run
            queue_after_run(self._at_end)

    def then(self, action: Callable[[], None]) -> None:
        """Call another action, after those that wait for the end of the pass that is ending now."""
        queue_after_run(action)

    def _at_end(self) -> None:
        # When a run is over, the node that is being computed is the one that has started it from within another run.
        outer = computed_node()
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


def note_additions(exchange: weakref.ref[GradientExchange], parameter: nn.Parameter) -> Any:
    """Have a parameter's additions noted by an exchange that still lives; a hook must not keep it alive."""

    def note(parameter: nn.Parameter) -> None:
        alive = exchange()
        if alive is not None:
            alive.note_addition(parameter)

    is_trainable = parameter.requires_grad
    parameter.requires_grad_(True)  # torch refuses a hook on a frozen one, and keeps it when it is frozen again
    register: Any = parameter.register_post_accumulate_grad_hook
    handle = register(outside_of_compilers(note))
    parameter.requires_grad_(is_trainable)
    return handle
