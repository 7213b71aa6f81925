#!/bin/bash
# One training stage on several machines under SLURM: sbatch recipes/cluster/slurm.sh
# What to change is marked CHANGE. Every machine runs one launcher, and each launcher one process per GPU.
# SLURM sends SIGTERM before the time limit: the run saves a checkpoint and ends; submit it again
# unchanged, and it goes on.

#SBATCH --job-name=llmlab
#SBATCH --nodes=2                 # CHANGE: machines
#SBATCH --gpus-per-node=8         # CHANGE: GPUs of each machine
#SBATCH --cpus-per-task=64        # CHANGE: cores of each machine, for all of its processes
#SBATCH --time=24:00:00           # CHANGE
#SBATCH --ntasks-per-node=1       # one launcher a machine
#SBATCH --signal=TERM@600         # ten minutes to save before the time limit
#SBATCH --output=%x-%j.log
#SBATCH --requeue

set -euo pipefail

source .venv/bin/activate         # CHANGE: where llmlab is installed, on a disk that all machines share
CONFIG=sft.yaml                   # CHANGE: the settings of the run
OUTPUT=runs/sft                   # CHANGE: the run folder, on a disk that all machines share
ACCELERATE=multi_node_fsdp2       # CHANGE: multi_node_ddp where the model fits on one GPU

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-0}   # CHANGE to 1 where compute nodes have no network
# export NCCL_SOCKET_IFNAME=ib0              # CHANGE where NCCL finds the wrong network interface

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
PORT=$((20000 + SLURM_JOB_ID % 20000)) # another one for each job

# a job that was requeued goes on from its last checkpoint
WORDS=(--config "$CONFIG" --output-dir "$OUTPUT")
if [ -f "$OUTPUT/llmlab.json" ]; then WORDS=(--resume "$OUTPUT"); fi

# in single quotes: each machine fills in its own SLURM_NODEID
export HEAD PORT ACCELERATE
srun bash -c 'exec llmlab sft "$@" --accelerate "$ACCELERATE" --launch-args "
    --num_machines $SLURM_NNODES --machine_rank $SLURM_NODEID --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE))
    --main_process_ip $HEAD --main_process_port $PORT"' launch "${WORDS[@]}"
