#!/usr/bin/env bash
# Run all tests.
#
#   launch/test.sh [pytest arguments...]   set up if needed, then the linters, then pytest (default: all of tests/)
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
"$root/launch/setup.sh"
cd "$root"

ruff check .
ruff format --check .
mypy
shellcheck --external-sources launch/*.sh launch/slurm.sbatch .ci/run
exec python -m pytest "$@"
