"""Many short runs side by side: each a fork of one process that has imported the libraries already."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence

from nostalgia.sweep_runner import Job

IMPORTED = ("nostalgia.experiment.run", "peft", "torchvision.transforms.v2", "transformers")


def run_missing(
    jobs: Sequence[Job], at_a_time: int, until: float | None = None, keep: Sequence[str] | None = None
) -> None:
    """Run what is not complete, ``at_a_time`` forks at once; none begins after ``until`` (of `time.monotonic`).

    A run's output is in its log, and so is the reason of one that fails. Of a complete run's folder only ``keep`` stays; None:
    all of it (a run of ten tasks holds ten checkpoints and their memories).
    """
    for name in IMPORTED:  # before the forks, which then have them
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork need not walk the libraries
    under_way = 0
    for job in jobs:
        if job.complete:
            continue
        if under_way == at_a_time:
            os.wait()
            under_way -= 1
        if until is not None and time.monotonic() > until:
            break
        if os.fork() == 0:
            _run(job, keep)
        under_way += 1
        print(job.name, flush=True)
    for _ in range(under_way):
        os.wait()


def _run(job: Job, keep: Sequence[str] | None) -> None:
    """In a fork: the run, its output in the job's log; ends the process."""
    code = 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not what it means to the process that forks
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import torch

        from nostalgia import train

        torch.set_num_threads(1)
        code = train.main([*job.words, "--run-dir", str(job.folder), "--resume", "auto"])
        if code == 0 and keep is not None:
            for entry in job.folder.iterdir():
                if entry.name not in keep and entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
    finally:
        sys.stdout.flush()
        os._exit(code)
