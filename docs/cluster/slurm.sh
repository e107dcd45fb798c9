#!/bin/bash
# Encode a collection on four machines with eight GPUs each. A job that is killed or requeued goes on from the finished shards.
#   sbatch docs/cluster/slurm.sh
#SBATCH --job-name=mof-encode
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

images="${IMAGES:-/shared/images/train-*.tar}" # quoted: mof expands the pattern; on a file system that the first machine sees, or an fsspec URL
output="${OUTPUT:-/shared/features}"           # on a file system that all machines see
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"

export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1
# Ray starts on all machines; the command behind -- runs on the first machine, when all have joined.
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$SLURM_CPUS_PER_TASK" \
  --num-gpus "$SLURM_GPUS_PER_NODE" -- \
  mof encode --images "$images" --encoder clip-vit-l14-336 --encoder dinov2-vit-l14 --dtype bfloat16 --output "$output" --ray "$head:6379"
