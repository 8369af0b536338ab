#!/usr/bin/env bash
# The batch script of a Slurm job: slurm_job.sh WORKDIR COMMAND.., the command being that of one task.
# Before a preemption or the end of its time Slurm sends SIGTERM to the tasks, and not to this script; the program saves
# and ends with status 0, with which the job would count as done. So it goes back to the queue if there are no results.
set -euo pipefail

workdir=$1
# Since Slurm 22.05 srun does not take this from sbatch.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 "${@:2}"
if [[ ! -e $workdir/results.json ]]; then
  echo "stopped before it was done: job $SLURM_JOB_ID goes back to the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
