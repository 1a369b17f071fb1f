#!/bin/bash
# One training on two machines of four GPUs:
#     sbatch train.sh store/ run/ --set train.samples=100000
# Two minutes before its time is up it saves, is queued again, and goes on. A job that is preempted, or whose
# machine fails, goes on in the same way.
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

# Slurm signals this script (B:), which hands it on to the ranks; to srun it would mean to end them at once.
# If the job is being preempted, Slurm has told them already and refuses to do so again: hence the limit.
trap 'asked=1; timeout 10 scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# The ranks end together, with exit code 130; the first must not take the others with it.
srun --kill-on-bad-exit=0 voxelscale train "$@" &
ranks=$!
wait "$ranks"
code=$?
while kill -0 "$ranks" 2> /dev/null; do # it was the signal that ended the wait
    wait "$ranks"
    code=$?
done

# 130: saved, not finished. Then again; but after scancel the job is no longer RUNNING, and stays cancelled.
if { [ "$code" = 130 ] || { [ "$asked" ] && [ "$code" != 0 ]; }; } &&
    [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    trap - TERM # with which Slurm now ends this script
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code"
