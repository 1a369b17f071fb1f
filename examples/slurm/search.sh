#!/bin/bash
# A search whose workers are on eight machines of four GPUs; each trial has one GPU:
#     sbatch search.sh store/ search/ --trials 400
# The same again adds workers to it. When time is up the workers save their trials, and the same resumes them.
#SBATCH --job-name=search
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=search-%j.log

# Slurm signals this script (B:), which hands it on to the workers; to srun it would mean to end them at once.
# If the job is being preempted, Slurm has told them already and refuses to do so again: hence the limit.
trap 'asked=1; timeout 10 scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# The first worker to end must not take the others with it.
srun --kill-on-bad-exit=0 voxelscale search "$@" &
workers=$!
wait "$workers"
code=$?
while kill -0 "$workers" 2> /dev/null; do # it was the signal that ended the wait
    wait "$workers"
    code=$?
done

# 130: saved, not finished. Then again; but after scancel the job is no longer RUNNING, and stays cancelled.
if { [ "$code" = 130 ] || { [ "$asked" ] && [ "$code" != 0 ]; }; } &&
    [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    trap - TERM # with which Slurm now ends this script
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code"
