"""`python -m hvdtrain.install ROOT ENVIRONMENT`, run by launch/setup.sh."""

import sys
from pathlib import Path

from hvdtrain.install.environment import set_up
from hvdtrain.install.preflight import SetupError

if __name__ == "__main__":
    try:
        set_up(Path(sys.argv[1]), Path(sys.argv[2]))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
