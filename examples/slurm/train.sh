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

# Slurm signals this script (B:), which hands it on to all ranks.
trap 'kill -TERM "$ranks"' TERM

srun --kill-on-bad-exit=0 voxelscale train "$@" &
ranks=$!
while kill -0 "$ranks" 2> /dev/null; do wait "$ranks"; code=$?; done

# 130: saved, not finished. After scancel the job is no longer RUNNING and stays cancelled.
if [ "$code" = 130 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60
fi
exit "$code"
