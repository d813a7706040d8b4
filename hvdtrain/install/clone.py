"""The clone that this package belongs to, if any, and the command that sets up from where the user is."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def this_clone() -> Path | None:
    """Return the clone that this package belongs to, None where it came by pip."""
    root = PACKAGE.parents[1]
    return root if (root / "setup.cfg").exists() and (root / "launch" / "setup.sh").exists() else None


def setup_command() -> str:
    """Return the command that makes or mends the environment: a user without a clone has no launch/setup.sh."""
    return "launch/setup.sh" if this_clone() else "hvdtrain setup"


def other_environment() -> str:
    """Return how one gets an environment of one's own, in words that follow on `deactivate`."""
    if this_clone():
        return "run this again: launch/setup.sh makes an environment, .venv"
    return "python3 -m venv <folder> && . <folder>/bin/activate, install hvdtrain there, `hvdtrain setup`"
