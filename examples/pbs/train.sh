#!/bin/bash
# One training on two machines of four GPUs, with PBS Pro or OpenPBS and the mpiexec of PALS or Open MPI:
#     qsub -v store=/path/store,run=/path/run train.sh
# NOT TESTED: written from the manuals of PBS, PALS and Open MPI. The queue, the resources' names and the modules
# are your site's. After its time is up submit it again: it goes on from the last checkpoint.
#PBS -N train
#PBS -l select=2:ncpus=32:ngpus=4:mpiprocs=4
#PBS -l walltime=24:00:00
#PBS -j oe
#PBS -r y

cd "$PBS_O_WORKDIR" || exit
first=$(head -n 1 "$PBS_NODEFILE")
tasks=$(wc -l < "$PBS_NODEFILE")

# Where all ranks meet: on the first machine, at a port of this job's own.
export MASTER_ADDR=$first MASTER_PORT=$((20000 + ${PBS_JOBID%%[!0-9]*} % 10000))

# Ten minutes before the end all ranks save and stop: a file in the run's folder asks them to.
(sleep $((24 * 3600 - 600)) && touch "$run/stop") &

if mpiexec --version 2>&1 | grep -q "Open MPI"; then
    mpiexec -n "$tasks" -x MASTER_ADDR -x MASTER_PORT voxelscale train "$store" "$run"
else # PALS, as on HPE Cray
    mpiexec -n "$tasks" --ppn 4 voxelscale train "$store" "$run"
fi
code=$?
kill %1
exit "$code"
