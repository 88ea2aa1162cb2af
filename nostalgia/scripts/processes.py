"""What a launch script has to know before it starts any process; refuses a wrong command line at once.

python -m nostalgia.scripts.processes ARGUMENTS OF nostalgia.train

Prints three lines: how many processes to start on this machine, ``cuda`` or ``cpu``, and the run's fixed folder (empty
where the command line names one, or where nothing is to be run).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from nostalgia.config import Request, parse
from nostalgia.errors import NostalgiaError, UsageError

CPU_PROCESSES = 2  # without a GPU, and where NPROC does not say


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        request = parse(words)
        processes, device = devices(request, os.environ)
        folder = run_folder(request, words, os.environ, datetime.now())
    except NostalgiaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(processes, device, "" if folder is None else folder, sep="\n")
    return 0


def devices(request: Request, environment: Mapping[str, str]) -> tuple[int, str]:
    """Processes to start, and on what; raises UsageError for an ``NPROC`` that is not a count."""
    given = environment.get("NPROC", "")
    if given and not (given.isdigit() and int(given) > 0):
        raise UsageError(f"NPROC={given}: the number of processes of this machine, 1 or more")
    gpus = 0
    if request.config.train.accelerator != "cpu":
        from torch import cuda  # seconds to import: only where it decides anything

        gpus = cuda.device_count()
    return int(given or gpus or CPU_PROCESSES), "cuda" if gpus else "cpu"


def run_folder(request: Request, words: Sequence[str], environment: Mapping[str, str], now: datetime) -> Path | None:
    """``RUN_DIR``, else a new ``<output_dir>/<date_time>``: one folder for all restarts of a job."""
    named = any(word.split("=")[0] in ("--run-dir", "--resume") for word in words)
    if named or request.dry_run:
        return None
    if environment.get("RUN_DIR"):
        return Path(environment["RUN_DIR"])
    parent = Path(request.config.experiment.output_dir).expanduser()
    stamp = f"{now:%Y-%m-%d_%H-%M-%S}"
    folder, number = parent / stamp, 1
    while folder.exists():
        number += 1
        folder = parent / f"{stamp}_{number}"
    return folder


if __name__ == "__main__":
    sys.exit(main())
