#!/usr/bin/env bash
# Run the linters and the tests, in an environment that launch/setup.sh makes first.
#
#   launch/test.sh                           all of it, in lanes: about 20 minutes on two cores
#   launch/test.sh --fast                    linters, types and the unit tests but for the slow ones: within a minute
#   launch/test.sh [pytest arguments...]     linters, types, and what pytest is asked for
#
# To test on something else than is usual, in .venv-NAME of its own; with --fast without Horovod, which cannot be built
# where pip has a torch for CUDA only and there is no nvcc:
#   --torch torch==2.12.1    another torch
#   --python python3.13      another Python
set -euo pipefail
unset CDPATH # with it, `cd` prints where it has gone
here=$(dirname "${BASH_SOURCE[0]}")
fast='' other=''
while (($#)); do
  case $1 in
    --fast) fast=1 && shift ;;
    --torch) export HVDTRAIN_TORCH=${2:?--torch needs a requirement such as torch==2.12.1} && other+="-$2" && shift 2 ;;
    --python) export HVDTRAIN_PYTHON=${2:?--python needs a program such as python3.13} && other+="-$(basename "$2")" && shift 2 ;;
    *) break ;;
  esac
done
if [[ -n $other ]]; then
  VIRTUAL_ENV=$(cd "$here/.." && pwd -P)/.venv${other//==/-}
  export VIRTUAL_ENV
  [[ -z $fast ]] || export HVDTRAIN_WITHOUT_HOROVOD=1
fi
# shellcheck source=launch/environment.sh
. "$here/environment.sh"
"$root/launch/setup.sh"
cd "$root"

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# Run a command as the lane $1: each of its lines is shown at once, behind the lane's name, and kept.
lane() {
  local name=$1
  shift
  PYTHONUNBUFFERED=1 "$@" 2>&1 | tee "$logs/$name" | sed -u "s/^/$name: /"
}

lint() {
  ruff check .
  ruff format --check .
  shellcheck --external-sources launch/*.sh launch/slurm.sbatch .ci/run
  mypy
}

# Say which tests failed, since other lanes' lines stand between, and what each lane came to; the last line is their sum.
summarize() {
  (cd "$logs" && grep -H -E '^(FAILED|ERROR) ' -- *) | sed 's/:/: /' || true
  awk '
    FNR == 1 { lane = FILENAME; sub(/.*\//, "", lane); if (lane != "lint") seen[lane] = 1 }
    / in [0-9.]+s/ && /passed|failed|error|no tests ran|deselected/ {
      gsub(/=+ | =+/, ""); said[lane] = $0
    }
    END {
      for (lane in said) {
        printf "%-10s %s\n", lane, said[lane]
        n = split(said[lane], words, /[ ,]+/)
        for (i = 2; i <= n; i++) total[words[i]] += words[i - 1]
      }
      failed = total["failed"] + total["error"] + total["errors"]
      for (lane in seen) {
        if (!(lane in said)) {
          printf "FAILED %s: its process ended in the midst of a test, the one behind its last line\n", lane
          failed++
        }
      }
      printf "tests: %d passed, %d failed, %d skipped\n", total["passed"], failed, total["skipped"]
    }' "$logs"/*
}

code=0
if [[ -n $fast ]]; then
  lane lint lint &
  lane unit python -m pytest tests/unit -m "not slow" "$@" || code=1
  wait $! || code=1
elif (($#)); then
  lint
  exec python -m pytest "$@"
else
  # Launches seldom keep all cores busy, so two lanes go side by side. What watches the clock or the whole machine
  # (marked alone) comes after them.
  lint
  lane beside python -m pytest -m "beside and not alone" &
  lane launches python -m pytest -m "not beside and not alone" || code=1
  wait $! || code=1
  lane alone python -m pytest -m alone || code=1
fi
summarize
exit "$code"
