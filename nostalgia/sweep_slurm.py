"""Runs of a sweep as Slurm jobs, by submitit: a node each; when its time is up a run writes a checkpoint and is requeued."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nostalgia.errors import UsageError
from nostalgia.sweep_runner import Job, Started, run_command, run_environment

#: submitit's parameters of any cluster; others are Slurm's own (partition, account, qos, constraint, ...).
GENERAL = ("name", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "timeout_min", "cluster")
SECONDS = 2.0  # between looks at a job


def read_parameters(text: str) -> dict[str, Any]:
    """``partition=gpu,gpus_per_node=4,timeout_min=240`` as submitit takes it; raises UsageError for words of another form."""
    found: dict[str, Any] = {}
    for word in text.split(","):
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier() or not value:
            raise UsageError(f"--slurm {word or text}: allowed is KEY=VALUE,..., such as partition=gpu,timeout_min=240")
        found[key if key in GENERAL else f"slurm_{key}"] = int(value) if value.isdecimal() else value
    for key in ("nodes", "tasks_per_node"):
        if found.get(key, 1) != 1:
            raise UsageError(
                f"--slurm {key}={found[key]}: a run of a sweep is on one node; launch/slurm.sbatch takes several"
            )
    return found


class SlurmStarter:
    """Starts runs as jobs of one executor, whose own files are under ``folder``/%j."""

    def __init__(self, parameters: Mapping[str, Any], folder: Path) -> None:
        try:
            import submitit
        except ImportError:
            raise UsageError('--slurm needs submitit: pip install "nostalgia[slurm]"') from None
        given = dict(parameters)
        cluster = given.pop("cluster", "slurm")
        try:
            self.executor = submitit.AutoExecutor(folder / "%j", cluster=cluster)
            self.executor.update_parameters(**given)
        except (RuntimeError, ValueError, NameError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise UsageError(f"--slurm: {first}") from None

    def __call__(self, job: Job, environment: Mapping[str, str]) -> Started:
        from submitit.core.utils import FailedJobError

        self.executor.update_parameters(name=job.name.replace(" ", "-").replace("/", "-"))
        run = Run(run_command(job), str(job.folder.absolute()), str(job.log.absolute()))
        try:
            return SlurmRun(self.executor.submit(run), job.log)
        except (FailedJobError, OSError, RuntimeError) as error:
            _note(job.log, f"it cannot be submitted: {' '.join(str(error).split())[:500]}")
            return NotStarted()


class Run:
    """What is done on the node: the run as it would be here. Pickled, so without a process in it."""

    def __init__(self, command: Sequence[str], run_dir: str, log: str) -> None:
        self.command, self.run_dir, self.log = list(command), run_dir, log
        self.pid = 0

    def __call__(self) -> int:
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                self.command,
                env=run_environment(self.run_dir, {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_leave_the_signal_to_submitit,
            )
        self.pid = process.pid
        return process.wait()

    def checkpoint(self) -> Any:
        """submitit's handler of a time that is up or a preemption: the run writes a checkpoint, and is submitted again."""
        from submitit.helpers import DelayedSubmission

        if self.pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended just now
                os.kill(self.pid, signal.SIGTERM)
                # The interrupted wait of __call__ holds Popen's lock: look at the process without it.
                while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                    time.sleep(0.1)
        return DelayedSubmission(Run(self.command, self.run_dir, self.log))


def _leave_the_signal_to_submitit() -> None:
    """Slurm signals every process of a step; the run is told by SIGTERM, from `Run.checkpoint`."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class NotStarted:
    """A run that Slurm has not taken; why is in its log."""

    def wait(self) -> int:
        return 4

    def send_signal(self, number: int) -> None:
        """There is nothing to end."""


def _note(log: Path, line: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"error: {line}\n")


def _reason(text: str) -> str:
    """The line that names the error in what submitit says of a job, a traceback and where its files are."""
    lines = text.strip().splitlines() or ["no reason given"]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (named or lines)[-1 if named else 0]


class SlurmRun:
    """A submitted job, as the sweep waits for it."""

    def __init__(self, job: Any, log: Path) -> None:
        self.job, self.log, self.cancelled = job, log, False

    def wait(self) -> int:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        while not self.job.done():
            time.sleep(SECONDS)
        try:
            return int(self.job.result())
        except (FailedJobError, UncompletedJobError) as error:
            if self.cancelled:
                return 75
            _note(self.log, f"job {self.job.job_id}: {_reason(str(error))}")
            return 4

    def send_signal(self, number: int) -> None:
        """Any signal ends the job: Slurm sends its processes SIGTERM, upon which a run writes a checkpoint."""
        self.cancelled = True
        self.job.cancel()
