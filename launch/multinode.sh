#!/usr/bin/env bash
# Trains on several machines: the same line on each of them, where only NODE_RANK differs (0 is MASTER_ADDR).
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 MASTER_PORT=29500 launch/multinode.sh --suite main [KEY=VALUE ...]
# STRATEGY=ddp (default) or fsdp. The run's folder must be on a disk that all machines see, in the same place.
set -uo pipefail
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
for name in NNODES NODE_RANK MASTER_ADDR; do
  if [ -z "${!name:-}" ]; then
    echo "error: $name is not set: give NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (default 29500)" >&2
    exit 2
  fi
done
MASTER_PORT=${MASTER_PORT:-29500}
case ${STRATEGY:-ddp} in
  ddp) ;;
  fsdp) export ACCELERATE_USE_FSDP=true ;;
  *)
    echo "error: STRATEGY=$STRATEGY: allowed are ddp and fsdp" >&2
    exit 2
    ;;
esac
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch "$@"
