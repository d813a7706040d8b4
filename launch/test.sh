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
shellcheck --external-sources launch/*.sh launch/slurm.sbatch .ci/run
types=$(mktemp)
trap 'rm -f "$types"' EXIT
mypy > "$types" 2>&1 & # while the tests, which seldom keep all cores busy, begin
code=0
python -m pytest "$@" || code=$?
wait $! || code=1
cat "$types"
exit "$code"
