"""What a set-up prints: it goes on where nobody reads it any more."""

from __future__ import annotations

import os
import sys


def tell(line: str) -> None:
    """Print a line at once; nothing once the reader has gone, as after `launch/setup.sh | head -1`."""
    try:
        print(line, flush=True)
    except OSError:
        # What Python still holds is written there at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
