#!/usr/bin/env bash
# One process on one GPU or the CPU, a few batches a task, everything else real:  launch/debug.sh --suite demo
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec python -m nostalgia.train --debug "$@"
