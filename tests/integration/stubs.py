"""Stand-ins for a cluster's commands, put first on PATH: what Slurm would do with one task a node, on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SRUN = r"""#!/usr/bin/env bash
# One task a node, all on this machine; signals go on to the tasks; ends with the highest exit code.
while [[ $1 == --* ]]; do echo "$1" >>"$SLURM_STUB_LOG"; shift; done
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
  SLURM_NODEID=$node SLURM_PROCID=$node "$@" &
  tasks+=($!)
done
for signal in USR1 TERM; do trap "echo forwarded $signal >>$SLURM_STUB_LOG; kill -s $signal ${tasks[*]}" "$signal"; done
worst=0
for task in "${tasks[@]}"; do
  wait "$task"
  while kill -0 "$task" 2>/dev/null; do wait "$task"; done
  wait "$task"
  code=$?
  ((code > worst)) && worst=$code
done
exit "$worst"
"""

SCONTROL = r"""#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") for ((node = 0; node < SLURM_NNODES; node++)); do echo 127.0.0.1; done ;;
  *) echo "scontrol $*" >>"$SLURM_STUB_LOG" ;;
esac
"""

TORCHRUN = r"""#!{python}
import os, signal, sys, time
from pathlib import Path
from nostalgia.config import parse, save
from nostalgia.logging.results import RunResults, write_results

from nostalgia.experiment.method_choice import complete_method

request = parse(sys.argv[sys.argv.index("-m") + 2 :])
complete_method(request.config)
folder, method, seed = request.run_dir, request.config.method["name"], request.config.experiment.seed
folder.mkdir(parents=True, exist_ok=True)
if os.environ.get("SLURM_NODEID", "0") != "0":
    sys.exit(0)
save(request.config, folder / "config.yaml")
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(f"{{method}} {{seed}}\n")
does = os.environ.get(f"STUB_{{method}}_{{seed}}", "")
if does == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (Path(os.environ["NOSTALGIA_EXIT_FILE"]).write_text("75"), sys.exit(1)))
    time.sleep(60)
if does == "fail":
    print("error: task1_digits, epoch 3, step 7: the loss is not finite")
    Path(os.environ["NOSTALGIA_EXIT_FILE"]).write_text("4")
    sys.exit(0)
latest = folder.parent / "latest"
latest.unlink(missing_ok=True)
latest.symlink_to(folder.name)
acc = 0.5 + seed / 10
write_results(folder / "results", RunResults.of(
    tasks=["task1_digits"], classes=[["0", "1"]], accuracy_matrix=[[acc]], method=method, seed=seed,
    world_size=2, seconds=1.0,
))
"""


def torchrun(folder: Path) -> dict[str, str]:
    """A torchrun that writes a run's results without training; notes what ran in STUB_LOG."""
    (folder / "torchrun").write_text(TORCHRUN.format(python=sys.executable))
    (folder / "torchrun").chmod(0o755)
    return {"PATH": os.pathsep.join([str(folder), os.environ["PATH"]]), "STUB_LOG": str(folder / "ran")}


SBATCH = r"""#!/usr/bin/env bash
# Runs the batch script at once, here: the options before it, then the script and its words.
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && export SLURM_NNODES=${1#--nodes=}; shift; done
SLURM_SUBMIT_DIR=$PWD exec bash "$@"
"""


def slurm(folder: Path, *, nodes: int, job: int) -> dict[str, str]:
    """Write the stubs into ``folder``; returns the environment of a batch script of ``job`` on ``nodes`` nodes."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        "SLURM_STUB_LOG": str(folder / "log"),
        "SLURM_JOB_ID": str(job),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
    }
