#!/usr/bin/env bash
# Train on this machine.
#
#   launch/local.sh [N] [arguments...]     set up if needed, then horovodrun -np N python -m hvdtrain [arguments...]
#
# N is the number of ranks; the default is one per GPU (of CUDA_VISIBLE_DEVICES, where that is set), or without any one
# per core, 4 at most. Ctrl-C and SIGTERM reach every rank; a second one ends them at once.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
"$root/launch/setup.sh"

cores=$(nproc)
ranks=$((cores < 4 ? cores : 4))
gpus=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU' || true)
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then # others are hidden: CUDA takes what stands before the first -1
  shown=${CUDA_VISIBLE_DEVICES%%-1*}
  [[ ${shown,,} =~ ^(none|void|nodevfiles)$ ]] && shown=''
  IFS=, read -ra shown <<< "$shown"
  gpus=$((${#shown[@]} < gpus ? ${#shown[@]} : gpus))
fi
if ((gpus > 0)); then
  ranks=$gpus
fi
if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  ranks=$1
  shift
fi

# Send signal $1 to each rank below process $2.
signal_ranks() {
  local child children argv
  read -ra children 2> /dev/null < "/proc/$2/task/$2/children" || true # its one line has no end: read "fails"
  for child in "${children[@]}"; do
    mapfile -d '' -t argv < "/proc/$child/cmdline" || continue
    if [[ ${argv[1]:-} == -m && ${argv[2]:-} == hvdtrain ]]; then
      kill "-$1" "$child" || true
    else
      signal_ranks "$1" "$child"
    fi
  done
}

stop() {
  signal_ranks "$signal" $$
  signal=KILL
}

command=("${horovodrun[@]}" -np "$ranks" python -m hvdtrain "$@")
printf '+'
printf ' %q' "${command[@]}"
printf '\n'
# horovodrun dies of a signal and leaves its ranks behind (seen with 0.28.1 under MPI), hence a session of its own, out
# of Ctrl-C's reach.
signal=TERM
trap stop INT TERM
setsid "${command[@]}" &
while true; do
  code=0
  wait $! || code=$?
  kill -0 $! 2> /dev/null || exit "$code" # else a signal has ended the wait, not the job
done
