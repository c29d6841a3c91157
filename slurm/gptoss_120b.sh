#!/usr/bin/env bash
# gptoss_120b on 16 nodes of 8 GPUs. From the repository: `sbatch slurm/gptoss_120b.sh [WORDS OF THE RECIPE]`
#SBATCH --job-name=gptoss_120b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
export RECIPE=${RECIPE:-recipes/gptoss_120b.py} DS_CONFIG=${DS_CONFIG:-ds_configs/zero3.json}
exec bash "${SLURM_SUBMIT_DIR:?start this with sbatch}/slurm/launch.sh" "$@"
