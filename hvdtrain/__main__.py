"""`python -m hvdtrain`."""

import sys

from hvdtrain.process.working_directory import search_last

search_last()

from hvdtrain.cli import main  # noqa: E402 - after it, for what `cli` imports

if __name__ == "__main__":
    sys.exit(main())
