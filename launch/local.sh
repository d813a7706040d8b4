#!/usr/bin/env bash
# Train on this machine.
#
#   launch/local.sh [N] [arguments...]     set up if needed, then horovodrun -np N python -m hvdtrain [arguments...]
#
# N is the number of ranks; the default is one per core, 4 at most.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
"$root/launch/setup.sh"

cores=$(nproc)
ranks=$((cores < 4 ? cores : 4))
if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  ranks=$1
  shift
fi
command=(horovodrun -np "$ranks" python -m hvdtrain "$@")
printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "${command[@]}"
