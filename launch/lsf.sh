#!/usr/bin/env bash
# Train in an LSF job that saves before its time limit and is put back into the queue.
#
#   bsub < launch/lsf.sh
#
# Submit it from this repository's directory, on a file system that all nodes share. Of an array (-J "hvdtrain[1-5]")
# each element is a run of its own, and %a in an argument is its number.
#
# Tried: shellcheck, and its body with the variables that LSF sets, in tests/e2e/test_launch_files.py. Never under LSF.

# EDIT 1: what the job gets: -n ranks, ptile of them on a node. -Q: exit code 75 puts the job back into the queue.
# -wt: minutes before the limit at which -wa's signal comes.
#BSUB -J hvdtrain
#BSUB -n 4
#BSUB -R "span[ptile=2] affinity[core(4)]"
#BSUB -W 4:00
#BSUB -wt 5
#BSUB -wa USR1
#BSUB -r
#BSUB -Q "75"
#BSUB -o hvdtrain-%J-%I.out
set -euo pipefail

# EDIT 2: the arguments and the run's directory.
read -ra arguments <<< "${HVDTRAIN_ARGUMENTS:-train lm}"
run_dir=${HVDTRAIN_RUN_DIR:-runs/lsf-$LSB_JOBID}

task=${LSB_JOBINDEX:-0} # 0: no array
if ((task > 0)); then
  [[ $run_dir == *%a* ]] || run_dir+=-%a
  run_dir=${run_dir//%a/$task}
  arguments=("${arguments[@]//%a/$task}")
fi

cd "${LS_SUBCWD:?start this with bsub}"
# shellcheck source=launch/environment.sh
. launch/environment.sh

# LSB_MCPU_HOSTS is "node1 2 node2 2".
read -ra words <<< "$LSB_MCPU_HOSTS"
hosts=''
ranks=0
for ((i = 0; i < ${#words[@]}; i += 2)); do
  hosts+="${hosts:+,}${words[i]}:${words[i + 1]}"
  ranks=$((ranks + words[i + 1]))
done

hand_on
command=(mpirun -np "$ranks" -H "$hosts" --bind-to none "${forwarded[@]}")
command+=(python -m hvdtrain "${arguments[@]}" --run-dir "$run_dir")
printf '+'
printf ' %q' "${command[@]}"
printf '\n'

# In the background: bash handles a signal only while it waits. mpirun passes USR1 on to the ranks.
"${command[@]}" &
trap 'kill -USR1 $!' USR1 TERM
while true; do
  code=0
  wait $! || code=$?
  kill -0 $! 2> /dev/null || break
done
exit "$code"
