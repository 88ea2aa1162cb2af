#!/usr/bin/env bash
# As ddp.sh, with FSDP2: each rank keeps a share of the parameters, sharded by transformer layer.
#   launch/fsdp.sh --suite main [KEY=VALUE ...]
set -uo pipefail
export ACCELERATE_USE_FSDP=true
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch "$@"
