#!/bin/bash
# Build a dataset on whole Slurm nodes: starts Ray on all of them, runs the build on the first one.
#   sbatch pipelines/slurm.sh
#
# Change: nodes and time below, and the four values. Keep --exclusive: `ray symmetric-run` ends with
# `ray stop`, which ends every Ray process of yours on the node, also those of another job.
# A job that runs out of time is submitted again as it is: finished units are kept.
#SBATCH --job-name=codeflow
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
set -euo pipefail

VENV=$HOME/codeflow-venv   # on the shared file system, with codeflow[ray] installed
LIST=$HOME/list.txt        # list of repositories
OUT=$SCRATCH/data          # dataset folder on the shared file system
RECIPE=$HOME/midtrain-32k.toml

source "$VENV/bin/activate"

# One token for all nodes, readable only by you; without it, whoever reaches the port runs code.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.codeflow-ray-token
[ -s "$RAY_AUTH_TOKEN_PATH" ] || (umask 077 && openssl rand -hex 32 >"$RAY_AUTH_TOKEN_PATH")

# Ray's own files stay on the node, under a short name: its sockets' paths must be short.
export RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds for all nodes to come up, not 30

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Tables never pass through Ray, so its object store is small and the memory is left to units.
srun ray symmetric-run --address "$HEAD:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_ON_NODE" --object-store-memory 80000000 -- \
  codeflow build --repos "$LIST" --out "$OUT" --recipe "$RECIPE" \
  --executor ray --address "$HEAD:6379"
