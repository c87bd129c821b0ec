#!/usr/bin/env bash
# Train on all machines of a SLURM job:
#   sbatch --nodes 2 --gpus-per-node 4 scripts/slurm_train.sh +experiment=NAME train.sharding=full resume=true
#SBATCH --ntasks-per-node 1
#SBATCH --cpus-per-task 32
#SBATCH --signal B:TERM@600
#SBATCH --output %x-%j.out
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# shutdown-timeout: time to save a large model before what is left is killed
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend c10d --rdzv_endpoint "$head:29400" --rdzv_id "$SLURM_JOB_ID" --shutdown-timeout 600 \
    -m pregate.train "$@" &
# the batch script gets the signal, and srun hands it on to every machine
trap 'kill -TERM $!' TERM
wait $! || wait $!
