#!/bin/bash
# A run on Slurm, which queues itself again until it is finished. With vit-jax on the PATH:
#
#     sbatch scripts/slurm.sh --config=CONFIG --workdir=SHARED/run
#
#SBATCH --job-name=vit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

trap : TERM # Preemption may tell this shell, too; the run decides how it ends.
# JAX takes one GPU a task, unless it is told: all of the node's, for its only task.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-1} - 1)))
export JAX_LOCAL_DEVICE_IDS
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over by itself.

# After the first process has ended JAX needs config.silence_timeout (60 s) to say so in the others.
srun --kill-on-bad-exit=0 --wait=90 vit-jax train "$@"
status=$?

# 75: saved, start me again. Above 128: killed; something may be wrong, so not for ever.
if [ "$status" = 75 ] || { [ "$status" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; }; then
  echo "status $status: queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
