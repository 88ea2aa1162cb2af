#!/usr/bin/env bash
# The demo: the method, then plain fine-tuning, on two processes (or all GPUs), and both side by side.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUTPUT_DIR:-runs}
"$here/launch/ddp.sh" --suite demo --quiet experiment.output_dir="$out/demo" "$@"
"$here/launch/ddp.sh" --suite demo --quiet experiment.output_dir="$out/demo-finetune" method=finetune "$@"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
python -m nostalgia.report "$out/demo/latest" "$out/demo-finetune/latest" --out "$out/demo.html"
