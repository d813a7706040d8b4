"""A progress bar that stays in one line of the window, whatever its width and however it changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from tqdm.utils import disp_len

# Below this width, times and speed give way to what was learned.
_NARROW = 72
_FORMS = {True: "{percentage:3.0f}% {n_fmt}/{total_fmt}{postfix}", False: None}


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """tqdm's bar, which asks for the window's width each time that it is drawn.

    tqdm itself writes blanks over what was longer before, beyond the edge of a window that was made narrower: each time
    they would begin another line. A window that does not say its width, as many do in containers, has 80 columns.
    """

    def __init__(self, initial: int, total: int, stream: Any) -> None:
        self._stream = stream
        super().__init__(
            initial=initial, total=total, unit="step", leave=False, file=stream, ncols=columns_of(stream), nrows=20
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw it, as wide as the window is now."""
        self.ncols = columns_of(self._stream)
        self.bar_format = _FORMS[self.ncols < _NARROW]
        return super().display(msg, pos)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return the function that writes a line over the last one."""
        before = 0

        def show(text: str) -> None:
            nonlocal before
            blanks = min(before, columns_of(file)) - disp_len(text)
            file.write(f"\r{text}{' ' * blanks}")
            file.flush()
            before = disp_len(text)

        return show


def columns_of(stream: Any) -> int:
    """Return the width of the window behind a stream; COLUMNS, or 80, where it has none."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):  # no terminal: notebooks and tests
        columns = 0
    return columns or shutil.get_terminal_size().columns
