#!/usr/bin/env bash
#SBATCH --job-name=memsinks
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8      # one process per GPU: Lightning takes ranks and addresses from SLURM
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#
#   sbatch recipes/launch/slurm.sh --config recipe.yaml --data.launch.strategy hsdp --resume auto
#
# The arguments are those of `litgpt pretrain`. With `--resume auto`, the same line goes on after a time-out. Change the
# numbers above, not those below. All nodes must see the same out_dir and the same data.
set -euo pipefail

exec srun --kill-on-bad-exit=1 litgpt pretrain "$@" --devices "$SLURM_NTASKS_PER_NODE" --num_nodes "$SLURM_JOB_NUM_NODES"
