#!/usr/bin/env bash
# Train over several hosts with Open MPI's mpirun: the reference that the other launch files are held against.
#
#   launch/mpirun.sh train lm --train.steps 2000          arguments of `python -m hvdtrain`, but for --run-dir
#
# Every host needs this directory and its environment at the same path (a shared file system), and ssh without a
# password from here. SIGTERM, Ctrl-C and SIGUSR1 make the run save and stop with exit code 75; after a crash it is
# started again from its last checkpoint, without hosts that are gone (launch/supervise.sh).
#
# Tried: Open MPI 5.0 on one host, 2 ranks, with a signal, in tests/e2e/test_launch_files.py. Not tried: InfiniBand.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# EDIT 1: the hosts, each with its number of ranks (its GPUs, or its cores divided by the threads of a rank).
hosts=${HVDTRAIN_HOSTS:-localhost:2}
run_dir=${HVDTRAIN_RUN_DIR:-runs/mpirun}

# EDIT 2: the network. Empty: MPI chooses. A name as in `ip link`, or an address range such as 10.0.0.0/16.
interface=${HVDTRAIN_INTERFACE:-}
network=()
if [[ -n $interface ]]; then
  network+=(--mca btl_tcp_if_include "$interface")
  if [[ $interface == *[./:]* ]]; then
    echo "NCCL and Gloo take interfaces by name only, and choose by themselves: $interface is an address range" >&2
  else
    export HOROVOD_GLOO_IFACE=${HOROVOD_GLOO_IFACE:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
  fi
fi
# Ethernet: Open MPI's TCP ran large all-reduces at half speed without this flag.
network+=(--mca btl_tcp_flags 1)
# InfiniBand or RoCE through UCX: take the line above out and this one in.
# network+=(--mca pml ucx -x UCX_NET_DEVICES=mlx5_0:1)

ranks=0
for entry in ${hosts//,/ }; do
  [[ $entry == *:* ]] && ranks=$((ranks + ${entry##*:})) || ranks=$((ranks + 1))
done

# --bind-to none: hvdtrain gives each rank its share of the cores; bound to one core, a rank's threads would share it.
hand_on
command=(mpirun -np "$ranks" -H "$hosts" --bind-to none --map-by slot "${forwarded[@]}" "${network[@]}")
command+=(python -m hvdtrain "$@" --run-dir "$run_dir")

printf '+'
printf ' %q' "${command[@]}"
printf '\n'
exec "$root/launch/supervise.sh" --no-restart-after-stop -- "${command[@]}"
