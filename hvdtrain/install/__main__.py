"""`python -m hvdtrain.install`, `hvdtrain setup`, and what launch/setup.sh runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hvdtrain.install.clone import this_clone
from hvdtrain.install.environment import Environment
from hvdtrain.install.preflight import SetupError
from hvdtrain.install.steps import Setup

_DESCRIPTION = """\
Build Horovod 0.28.1 for the torch and the MPI of this environment, and install it there. It brings an MPI where there
is none, builds for about 6 minutes the first time, takes the wheel from the cache afterwards, and ends with a check on
two ranks. Run it again after a change of torch, Python or MPI; where nothing has changed it ends at once.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a set-up and return its exit code: 2 where something is missing that the user can mend."""
    try:
        setup = parse(arguments)
        # What it installs must be found where the environment is not active, as after `.venv/bin/hvdtrain setup`.
        os.environ["PATH"] = f"{setup.environment.folder / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        install_into_environments()
        setup.run()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> Setup:
    """Return the set-up that the command line asks for.

    Raises:
        SetupError: the environment would be the system's own.
    """
    asked = make_parser().parse_args(arguments)
    return Setup(
        environment=Environment((asked.environment or this_environment()).absolute()),
        root=asked.root or this_clone(),
        with_horovod=asked.only_horovod or not os.environ.get("HVDTRAIN_WITHOUT_HOROVOD"),
        only_horovod=asked.only_horovod,
        with_tests=not os.environ.get("HVDTRAIN_WITHOUT_TESTS"),
        wheel_dir=asked.wheel_dir.absolute() if asked.wheel_dir else None,
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(prog="hvdtrain setup", description=_DESCRIPTION)
    parser.add_argument("--only-horovod", action="store_true", help="Horovod alone, nothing that hvdtrain needs")
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="put a copy of Horovod's wheel there")
    parser.add_argument("--environment", type=Path, help="the environment; without it, that of this Python")
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)  # the clone, from launch/setup.sh
    return parser


def install_into_environments() -> None:
    """Have pip install into the environment that its Python belongs to, whatever variables and pip.conf say."""
    os.environ |= {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    for name in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_DRY_RUN"):
        os.environ.pop(name, None)


def this_environment() -> Path:
    """Return the environment of this Python; raise `SetupError` for the system's, which is not ours to fill."""
    if sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX") == sys.prefix:
        return Path(sys.prefix)
    raise SetupError(
        f"{sys.executable} belongs to no virtual environment, and Horovod is built for one.",
        "python3 -m venv <folder> && . <folder>/bin/activate, install hvdtrain there, then run this again",
    )


if __name__ == "__main__":
    sys.exit(main())
