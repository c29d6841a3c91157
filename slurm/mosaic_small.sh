#!/usr/bin/env bash
# mosaic_small on one node of 8 GPUs. From the repository: `sbatch slurm/mosaic_small.sh [WORDS OF THE RECIPE]`
#SBATCH --job-name=mosaic_small
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
export RECIPE=${RECIPE:-recipes/mosaic_small.py} DS_CONFIG=${DS_CONFIG:-ds_configs/zero1.json}
exec bash "${SLURM_SUBMIT_DIR:?start this with sbatch}/slurm/launch.sh" "$@"
