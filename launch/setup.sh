#!/usr/bin/env bash
# Make this machine ready to train: an environment with torch, MPI, Horovod built from source, and hvdtrain itself.
#
#   launch/setup.sh          about 6 minutes the first time, seconds afterwards; needs no root
#
# Uses the active virtual environment, else .venv in the repository, and the MPI on PATH, else the wheel from PyPI.
# HVDTRAIN_TORCH   what to install where there is no torch yet (default: torch==2.13.0); one that is there is kept
# HVDTRAIN_PYTHON  the Python for .venv (default: the first of python3, python3.13 ... python3.10 that is 3.10 to 3.13)
# HVDTRAIN_WITHOUT_HOROVOD=1  leaves out MPI and Horovod: one process trains without
# HVDTRAIN_WITHOUT_TESTS=1    leaves out what launch/test.sh runs
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

suitable() {
  command -v "$1" > /dev/null &&
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null
}

for python in "${HVDTRAIN_PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
  if suitable "$python"; then
    cd "$root" # `-m` looks there first
    PYTHONSAFEPATH='' exec "$python" -m hvdtrain.install --root "$root" --environment "$environment"
  fi
done
echo "No Python 3.10 to 3.13 is on PATH.
To mend it: conda create -n hvdtrain python=3.12 && conda activate hvdtrain" >&2
exit 2
