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
# Launches seldom keep all cores busy: what does not watch the clock or the whole machine goes side by side, the rest
# after it, alone.
beside=(tests/unit tests/e2e/test_{setup,generate_verb,hf,hosts,slurm}.py)
first=(tests/e2e/test_{train,ranks,verify_verb}.py)
said=$(mktemp)
trap 'rm -f "$said"' EXIT
(mypy && python -m pytest "${beside[@]}") > "$said" 2>&1 &
code=0
python -m pytest "${first[@]}" || code=1
wait $! || code=1
cat "$said"
python -m pytest tests "${beside[@]/#/--ignore=}" "${first[@]/#/--ignore=}" || code=1
exit "$code"
