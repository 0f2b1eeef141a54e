#!/usr/bin/env bash
# A template for Slurm: sbatch experiments/slurm.sh data=arc1 run_name=first ... (the arguments of pretrain_etrm.py).
# One torchrun per node starts a process per GPU. A job that is requeued or submitted again continues its newest checkpoint.
#SBATCH --job-name=etrm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
PYTHON=${PYTHON:-.venv/bin/python}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else torchrun keeps the addresses of dead processes over a restart

start() {  # start RESTARTS PORT ARGUMENTS...
  srun "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts "$1" \
    --rdzv-id "$SLURM_JOB_ID-$2" --rdzv-backend c10d --rdzv-endpoint "$head:$2" "${@:3}"
}

start 0 29500 -m tools.doctor "$@"        # a mistake ends the job within a minute
start 3 29501 pretrain_etrm.py "$@"
