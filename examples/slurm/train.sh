#!/bin/bash
# A training on two machines of four GPUs: sbatch train.sh STORE RUN
# Two minutes before its time is up, or when it is preempted, it saves; it is queued again and goes on.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=train-%j.log

# Slurm signals this script (B:), which hands it on to the ranks. Do not kill srun instead: it ends them at once.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# All ranks leave together, with exit code 130, so the first that has must not take the others with it.
srun --kill-on-bad-exit=0 voxelscale train "$@" &
wait $! || code=$?
while kill -0 $! 2> /dev/null; do code=0; wait $! || code=$?; done

# Saved, not finished: it is queued again. After scancel it is no longer RUNNING, and stays cancelled.
if [ "${code:-0}" = 130 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "${code:-0}"
