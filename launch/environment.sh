# shellcheck shell=bash
# Sourced by the scripts beside it: which environment is used, its programs first on PATH, Open MPI under root, and what
# is handed on to ranks on other hosts.

unset CDPATH     # with it, `cd` prints where it has gone
unset PYTHONHOME # of another Python, as an environment's own `activate` does
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
environment=${VIRTUAL_ENV:-}
# conda's base environment is active in every shell of many users, which is no request to install there.
if [[ -z $environment && -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
  environment=$CONDA_PREFIX
fi
if [[ -n $environment && $environment != "$root"/.venv* && ! -e $environment/bin/python ]]; then
  echo "the active environment, $environment, is not there any more: $root/.venv takes its place" >&2
  environment=''
fi
environment=${environment:-$root/.venv}

if [[ -n ${TMPDIR:-} && ! -d $TMPDIR ]]; then # Python takes another one then, programs that it starts do not
  echo "TMPDIR=$TMPDIR is no directory: /tmp takes its place" >&2
  unset TMPDIR
fi

# Open MPI does not start without HOME, which `env -i`, services and users without a name (docker run --user N) lack.
if [[ -z ${HOME:-} ]]; then
  HOME=$(getent passwd "$(id -u)" | cut -d: -f6) || true
  if [[ -z $HOME ]]; then
    HOME=${TMPDIR:-/tmp}/hvdtrain-$(id -u)
    mkdir -p "$HOME" && chmod 700 "$HOME"
  fi
  export HOME
fi

# It keeps what it has found out about hosts in HOME, and ends with a traceback where it cannot.
# shellcheck disable=SC2034
horovodrun=(horovodrun)
[[ -w $HOME/.horovod || -w $HOME && ! -e $HOME/.horovod ]] || horovodrun+=(--disable-cache)

export PATH="$environment/bin:$PATH"
if [[ $(id -u) == 0 ]]; then # containers, as a rule; Open MPI refuses root otherwise
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# hand_on: sets `forwarded` to mpirun's options that give ranks on all hosts what is set here for Python, threads, and
# the libraries below. A GPU that is named by its UUID is on this host alone; and where Slurm has given the job its GPUs,
# their numbers are this host's, and it tells each other host its own.
hand_on() {
  local name
  forwarded=(-x PATH)
  for name in $(compgen -e); do
    case $name in
      CUDA_VISIBLE_DEVICES)
        [[ ${!name} == *[A-Za-z]* || ${!name} == [0-9]* && -n ${SLURM_JOB_GPUS:-${SLURM_GPUS_ON_NODE:-}} ]] ||
          forwarded+=(-x "$name")
        ;;
      NCCL_* | HOROVOD_* | UCX_* | CUDA_* | CUBLAS_* | TORCH_* | TORCHINDUCTOR_* | PYTORCH_* | GLOO_* | FI_* | HF_* | \
        OMP_* | MKL_* | LD_LIBRARY_PATH | LD_PRELOAD | PYTHONPATH | VIRTUAL_ENV) forwarded+=(-x "$name") ;;
    esac
  done
}
