#!/bin/bash
# A scaling study on the GPUs of one machine; larger numbers of workers are emulated:
#     sbatch scale.sh store/ study/ --workers 1,8,64 --seeds 0,1,2
# When time is up the trainings save; the job is queued again, and goes on.
#SBATCH --job-name=scale
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=scale-%j.log

# Slurm signals this script (B:), which hands it on.
trap 'asked=1; kill -TERM $!' TERM

voxelscale scale "$@" &
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
