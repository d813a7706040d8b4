"""When Python looks for garbage: not during imports, and never at what they have made. Standard library only.

torch and what it brings along are some hundred thousand objects that stay to the end. While they are made Python looks
at all of them again and again, and later, in the midst of a step, each time that it looks at everything.
"""

from __future__ import annotations

import gc

_resting: list[bool] = []
"""That it was told to rest; a program that has switched it off itself keeps it so."""


def rest() -> None:
    """Have it look for none until `go_on`."""
    if gc.isenabled():
        gc.disable()
        _resting.append(True)


def go_on() -> None:
    """Have it look for garbage again where it was told to rest, and leave alone all that is there by now."""
    if _resting:
        _resting.clear()
        gc.freeze()
        gc.enable()
