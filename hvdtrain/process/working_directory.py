"""The folder in which a user has started us: it hides no module of Python's or of a library's, and it must be there.

Imported before all else, and so imports next to nothing: until `search_last` was called, a file `random.py` of the
user's is what any import of `random` finds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

_SAFE, _OURS = "PYTHONSAFEPATH", "HVDTRAIN_SAFEPATH"
_CODE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))  # noqa: PTH120


def search_last() -> None:
    """Have imports look for a module in the working directory after all other places, by whatever means we started.

    `python -m hvdtrain` puts that folder first, where a `random.py`, a `tokenizers/` or a `logging.py` of the user's
    takes the place of what Python and libraries mean; the command `hvdtrain` leaves it out. A clone that is the working
    directory stays where it is, since it may be found by nothing else. With PYTHONSAFEPATH nothing is added.
    """
    if os.environ.pop(_OURS, None):
        os.environ.pop(_SAFE, None)  # it was for the launcher above, see `for_launcher`
    try:
        here = os.getcwd()  # noqa: PTH109 - pathlib imports a dozen modules
    except OSError:
        return
    if here == _CODE or os.environ.get(_SAFE):
        return
    if sys.path[:1] in ([""], [here]):
        del sys.path[0]
    if here not in sys.path:
        sys.path.append(here)


def module_command(module: str) -> list[str]:
    """Return the words that start a module of ours, whatever the working directory holds (from Python 3.11 on)."""
    is_hidden = sys.version_info >= (3, 11) and not is_gone() and os.getcwd() != _CODE  # noqa: PTH109
    return [sys.executable, *(["-P"] if is_hidden else []), "-m", module]


def for_launcher(program: Sequence[str]) -> dict[str, str]:
    """Return the variables that keep the working directory's modules from a launcher of `module_command`'s words.

    `horovodrun` starts Pythons of its own, with `-c`. A rank removes them again: what it starts itself is the user's.
    """
    return {_SAFE: "1", _OURS: "1"} if program[1:2] == ["-P"] and not os.environ.get(_SAFE) else {}


def is_gone() -> bool:
    """Return whether the working directory was deleted, or was moved by another host."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError:
        return True
    return False
