"""When a backward pass is over."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from hvdtrain.models.private_tensors import drop_lost_hooks, identity_of
from hvdtrain.models.private_torch import (
    backward_run,
    computed_node,
    is_compiled_backward,
    outside_of_compilers,
    queue_after_run,
)

if TYPE_CHECKING:
    from hvdtrain.world.exchange import GradientExchange
    from hvdtrain.world.layout import Layout

_log = logging.getLogger("hvdtrain")


class EndOfBackward:
    """Calls `action` when a backward pass is over, still inside `backward()`.

    A checkpoint with `use_reentrant=True` runs a backward pass inside the outer one, as a run of the engine of its own:
    the outer one's end is meant. May call `action` more than once for a pass.

    Args:
        action: what to do; what it raises, `backward()` raises.
        speaks: warn of passes whose end nobody tells.
    """

    def __init__(self, action: Callable[[], None], speaks: bool = True) -> None:
        self._action = outside_of_compilers(action)
        self._run = -1
        """The engine's run whose end is waited for."""
        self._thread = 0
        self._is_over = True
        self._speaks = speaks

    def expect(self, *, on_host: bool = False) -> None:
        """Wait for the end of the pass that runs now; call it from a hook, as often as you like.

        Args:
            on_host: the hook is one of a tensor in host memory, and so runs in the thread that has called `backward`.

        Raises:
            RuntimeError: another thread's pass is not over.
        """
        run = backward_run()
        if run != self._run:
            if is_compiled_backward():
                self._say_never()
                return
            thread = threading.get_ident()
            if on_host and not self._is_over and thread != self._thread:
                raise RuntimeError(
                    "two threads compute gradients for one optimizer at the same time, of which neither knows when all"
                    " are there: let one backward() wait for the other, or call it once, for the sum of the losses"
                )
            self._run, self._thread, self._is_over = run, thread, False
            queue_after_run(self._at_end)

    def _say_never(self) -> None:
        """Warn, once, that nobody tells when this backward pass is over."""
        if self._speaks:
            self._speaks = False
            _log.warning(
                "gradients come from a compiled backward pass (compiled autograd), of which nobody is told when it is"
                " over: they are averaged by step(). Call optimizer.synchronize() behind backward() where anything"
                " looks at them before, as clipping does"
            )

    def then(self, action: Callable[[], None]) -> None:
        """Call another action, after those that wait for the end of the pass that is ending now."""
        queue_after_run(action)

    def _at_end(self) -> None:
        # When a run is over, the node that is being computed is the one that has started it from within another run.
        outer = computed_node()
        if outer is None:
            self._is_over = True
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


class Watched:
    """The parameters whose additions an exchange notes, as long as it lives: hooks must not keep it alive.

    Args:
        exchange: that is told of each addition.
    """

    def __init__(self, exchange: weakref.ref[GradientExchange]) -> None:
        self._exchange = exchange
        self._noted: dict[nn.Parameter, int] = {}
        """What stood for each within torch."""
        self._has_said_late = False

    def __len__(self) -> int:
        return len(self._noted)

    def watch(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Note additions to these, too.

        Returns those that were not noted before: new ones, and those whose insides were exchanged, without the hooks.
        """
        new = [item for item in parameters if self._noted.get(item) != identity_of(item)]
        for parameter in new:
            if parameter in self._noted:
                drop_lost_hooks(parameter)
            self._noted[parameter] = identity_of(parameter)
            if parameter.is_floating_point() or parameter.is_complex():
                self._hang_on(parameter)
        return new

    def _hang_on(self, parameter: nn.Parameter) -> None:
        exchange = self._exchange

        def note(parameter: nn.Parameter) -> None:
            alive = exchange()
            if alive is not None:
                alive.note_addition(parameter)

        is_trainable = parameter.requires_grad
        parameter.requires_grad_(True)  # torch refuses a hook on a frozen one, and keeps it when it is frozen again
        register: Any = parameter.register_post_accumulate_grad_hook
        register(outside_of_compilers(note))
        parameter.requires_grad_(is_trainable)

    def say_late(self, new: Sequence[nn.Parameter], layout: Layout, rank: int) -> None:
        """Warn, once, of gradients of parameters that were not watched while backward computed them."""
        late = [parameter for parameter in new if parameter.grad is not None and parameter.requires_grad]
        if late and not rank and not self._has_said_late:
            self._has_said_late = True
            _log.warning(
                "the gradient of %s%s is averaged by step(), and not at the end of backward(): the parameter was put"
                " in the place of another one since the step before. What looks at gradients in between, as clipping"
                " does, has seen this rank's own. Call optimizer.zero_grad() before backward(), which finds it",
                layout.name(late[0]),
                f" and {len(late) - 1} more" * (len(late) > 1),
            )
