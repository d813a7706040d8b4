#!/usr/bin/env bash
# Train over several hosts with horovodrun; with Gloo no MPI is needed.
#
#   launch/horovodrun.sh train lm --train.steps 2000      arguments of `python -m hvdtrain`, but for --run-dir
#
# Every host needs this directory and its environment at the same path (a shared file system), and ssh without a
# password from here. horovodrun passes no signal on under MPI and dies of SIGUSR1 under Gloo, hence the supervisor
# (launch/supervise.sh): it asks a rank on this host to stop, and starts the run again after a crash.
#
# Tried: 2 ranks on one host, Gloo and MPI, with a signal, in tests/e2e/test_launch_files.py.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# EDIT 1: the hosts, each with its number of ranks (its GPUs, or its cores divided by the threads of a rank). Let this
# host be among them, for the signals.
hosts=${HVDTRAIN_HOSTS:-localhost:2}
run_dir=${HVDTRAIN_RUN_DIR:-runs/horovodrun}

# EDIT 2: --gloo or --mpi, and the network's interfaces (empty: Horovod looks for those that all hosts share).
controller=${HVDTRAIN_CONTROLLER:---gloo}
interfaces=${HVDTRAIN_INTERFACE:-}
network=()
if [[ -n $interfaces ]]; then
  network+=(--network-interfaces "$interfaces")
fi

ranks=0
for entry in ${hosts//,/ }; do
  [[ $entry == *:* ]] && ranks=$((ranks + ${entry##*:})) || ranks=$((ranks + 1))
done

command=("${horovodrun[@]}" "$controller" -np "$ranks" -H "$hosts" "${network[@]}" python -m hvdtrain "$@" --run-dir "$run_dir")

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "$root/launch/supervise.sh" --no-restart-after-stop -- "${command[@]}"
