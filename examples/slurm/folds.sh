#!/bin/bash
# A cross-validation of the five folds of a store that was prepared with prepare.folds=5, each on one GPU:
#     sbatch folds.sh store/ scans/ cv/
#     sbatch --array=0-9 folds.sh luna/ luna16/ cv/        LUNA16's ten
# Each saves two minutes before its time is up, is queued again, and goes on. The last to end evaluates all of them.
#SBATCH --job-name=folds
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=folds-%A_%a.log

store=$1 scans=$2 out=$3 fold=$SLURM_ARRAY_TASK_ID
shift 3

# Slurm signals this script (B:), which hands it on.
trap 'asked=1; kill -TERM $!' TERM

voxelscale cv "$store" "$scans" "$out" --folds "$fold" "$@" &
wait $!
code=$?
while kill -0 $! 2> /dev/null; do # it was the signal that ended the wait
    wait $!
    code=$?
done

# 130: saved, not finished. Then again; but after scancel the job is no longer RUNNING, and stays cancelled.
if { [ "$code" = 130 ] || { [ "$asked" ] && [ "$code" != 0 ]; }; } &&
    [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    trap - TERM # with which Slurm now ends this script
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
fi
exit "$code"
