#!/usr/bin/env bash
# One process on one GPU or the CPU, a few batches a task, everything else real:  launch/debug.sh --suite demo
# Ends with what the full run would cost.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python -m "$module" --debug "$@"
