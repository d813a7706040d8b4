#!/usr/bin/env bash
# Train in a PBS Pro or OpenPBS job that saves before its time limit and submits its own continuation.
#
#   qsub -v HVDTRAIN_ARGUMENTS='train lm --train.steps 200000' launch/pbs.sh
#
# Submit it from this repository's directory, on a file system that all nodes share. Of an array (qsub -J 0-4) each
# subjob is a run of its own, and %a in an argument is its number: HVDTRAIN_ARGUMENTS='train lm --train.seed %a'.
#
# Tried: shellcheck, and its body with the variables that PBS sets, in tests/e2e/test_launch_files.py. Never under PBS.

# EDIT 1: what the job gets. mpiprocs: ranks of a node, one per GPU (with 8 cores for each) or per group of cores.
#PBS -N hvdtrain
#PBS -l select=2:ncpus=8:mpiprocs=2:ompthreads=4
#PBS -l walltime=04:00:00
#PBS -r y
#PBS -j oe
set -euo pipefail

# EDIT 2: how long before the time limit to stop, the run's directory, and the arguments.
budget=${HVDTRAIN_BUDGET:-3h50m}
run_dir=${HVDTRAIN_RUN_DIR:-runs/pbs}
read -ra arguments <<< "${HVDTRAIN_ARGUMENTS:-train lm}"

task=${PBS_ARRAY_INDEX:-}
if [[ -n $task ]]; then
  [[ $run_dir == *%a* ]] || run_dir+=-%a
  run_dir=${run_dir//%a/$task}
  arguments=("${arguments[@]//%a/$task}")
fi

cd "${PBS_O_WORKDIR:?start this with qsub}"
# shellcheck source=launch/environment.sh
. launch/environment.sh
ranks=$(wc -l < "$PBS_NODEFILE")
hosts=$(sort "$PBS_NODEFILE" | uniq -c | awk '{printf "%s%s:%s", separator, $2, $1; separator = ","}')

# PBS sends no signal early: hvdtrain watches the clock itself and ends with 75.
hand_on
command=(mpirun -np "$ranks" -H "$hosts" --bind-to none "${forwarded[@]}")
command+=(python -m hvdtrain "${arguments[@]}" --run-dir "$run_dir" --train.max-time "$budget")
printf '+'
printf ' %q' "${command[@]}"
printf '\n'

# qdel sends SIGTERM: pass USR1 on, which mpirun gives to the ranks, and wait for the save.
"${command[@]}" &
asked=
trap 'asked=yes; kill -USR1 $!' TERM USR1
while true; do
  code=0
  wait $! || code=$?
  kill -0 $! 2> /dev/null || break
done

if [[ $code == 75 && -z $asked ]]; then
  echo "the time is used up: submitting the continuation"
  qsub -v "HVDTRAIN_ARGUMENTS=${arguments[*]},HVDTRAIN_RUN_DIR=$run_dir,HVDTRAIN_BUDGET=$budget" launch/pbs.sh
fi
exit "$code"
