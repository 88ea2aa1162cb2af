#!/usr/bin/env bash
# Trains on all GPUs of this machine with DDP, or, without a GPU, in NPROC (default 2) CPU processes with gloo.
#   launch/ddp.sh --suite main [KEY=VALUE ...]
# Returns the program's own exit code, which launchers would turn into 1.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
NOSTALGIA_EXIT_FILE=$(mktemp)
export NOSTALGIA_EXIT_FILE
trap 'rm -f "$NOSTALGIA_EXIT_FILE"' EXIT

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  accelerate launch --config_file "$here/accelerate_config.yaml" --num_processes "${NPROC:-$gpus}" \
    -m nostalgia.train "$@"
else
  # accelerate launch --cpu would start one process only; torchrun forms the gloo group.
  export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  torchrun --standalone --nproc_per_node "${NPROC:-2}" -m nostalgia.train "$@"
fi
code=$?
if [ -s "$NOSTALGIA_EXIT_FILE" ]; then code=$(cat "$NOSTALGIA_EXIT_FILE"); fi
exit "$code"
