#!/usr/bin/env bash
# gptoss_20b on 4 nodes of 8 GPUs. From the repository: `sbatch slurm/gptoss_20b.sh [WORDS OF THE RECIPE]`
#SBATCH --job-name=gptoss_20b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
export RECIPE=${RECIPE:-recipes/gptoss_20b.py} DS_CONFIG=${DS_CONFIG:-ds_configs/zero2.json}
exec bash "${SLURM_SUBMIT_DIR:?start this with sbatch}/slurm/launch.sh" "$@"
