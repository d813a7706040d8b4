# shellcheck shell=bash
# Sourced by the scripts beside it: which environment is used, its programs first on PATH, and Open MPI under root.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
environment=${VIRTUAL_ENV:-}
# conda's base environment is active in every shell of many users, which is no request to install there.
if [[ -z $environment && -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
  environment=$CONDA_PREFIX
fi
environment=${environment:-$root/.venv}

export PATH="$environment/bin:$PATH"
if [[ $(id -u) == 0 ]]; then # containers, as a rule; Open MPI refuses root otherwise
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
