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
if (($#)); then
  mypy
  exec python -m pytest "$@"
fi
# Launches seldom keep all cores busy: types and unit tests go beside the first of them.
beside=$(mktemp)
trap 'rm -f "$beside"' EXIT
(mypy && python -m pytest tests/unit) > "$beside" 2>&1 &
code=0
python -m pytest --ignore tests/unit || code=$?
wait $! || code=1
cat "$beside"
exit "$code"
