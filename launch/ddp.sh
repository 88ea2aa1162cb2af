#!/usr/bin/env bash
# Trains on all GPUs of this machine with DDP, or, without a GPU, in NPROC (default 2) CPU processes with gloo.
#   launch/ddp.sh --suite main [KEY=VALUE ...]
# A process that dies restarts the job from its last checkpoint. Returns the program's own exit code.
set -uo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch "$@"
