"""Runs of a sweep submitted by submitit, whose executor of this machine stands in for Slurm's."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import submitit

from nostalgia.errors import UsageError
from nostalgia.sweep_runner import Job
from nostalgia.sweep_slurm import Run, SlurmRun, SlurmStarter, read_parameters
from tests.integration.test_sweep import WORDS, ran, sweep

# Ends with 75 and a checkpoint when it is told to stop; where there is a checkpoint, it goes on and is done.
STOPPABLE = """
if [ -e "$RUN_DIR/checkpoint" ]; then echo "error: none, went on"; exit 0; fi
trap 'touch "$RUN_DIR/checkpoint"; exit 75' TERM
touch "$RUN_DIR/started"
while true; do sleep 0.1; done
"""


@pytest.mark.exhaustive
def test_a_sweep_of_submitted_runs(tmp_path: Path) -> None:
    local = ("--slurm", "cluster=local,timeout_min=5")
    code, output, errors = sweep(tmp_path, *WORDS, *local, STUB_finetune_0="fail")
    assert code == 4, errors
    assert sorted(ran(tmp_path)) == ["finetune 0", "finetune 1", "nostalgia 0", "nostalgia 1"]
    assert "finetune seed 0 failed with exit code 4: task1_digits, epoch 3, step 7: the loss is not finite" in errors
    assert "0.550" in output
    code, output, errors = sweep(tmp_path, *WORDS, *local)
    assert (code, errors) == (0, "")
    assert ran(tmp_path) == ["finetune 0"]


def test_a_job_whose_time_is_up_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(Run(["bash", "-c", STOPPABLE], str(folder), str(tmp_path / "log")))
    until = time.monotonic() + 60
    while not (folder / "started").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    (task,) = psutil.Process(job._process.pid).children()
    task.send_signal(signal.SIGUSR2)  # as Slurm does before the time is up
    assert SlurmRun(job, tmp_path / "log").wait() == 0
    assert (tmp_path / "log").read_text() == "error: none, went on\n"


def test_a_job_that_fails_leaves_its_reason(tmp_path: Path) -> None:
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(Run(["no-such-command-here"], str(tmp_path), str(tmp_path / "log")))
    assert SlurmRun(job, tmp_path / "log").wait() == 4
    assert "no-such-command-here" in (tmp_path / "log").read_text()


def test_parameters() -> None:
    found = read_parameters("partition=gpu,gpus_per_node=4,timeout_min=240,constraint=a100")
    assert found == {"slurm_partition": "gpu", "gpus_per_node": 4, "timeout_min": 240, "slurm_constraint": "a100"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "KEY=VALUE"),
        ("partition", "--slurm partition: allowed is"),
        ("nodes=2", "one node"),
        ("a b=1", "KEY=VALUE"),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_parameters(text)


def test_what_the_cluster_does_not_know_is_one_line(tmp_path: Path) -> None:
    if os.system("command -v srun >/dev/null") == 0:
        pytest.skip("there is a Slurm here")
    with pytest.raises(UsageError, match="--slurm: ") as caught:
        SlurmStarter(read_parameters("partition=gpu"), tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="--slurm: "):
        SlurmStarter(read_parameters("cluster=local,timeout_mins=3,slurm_nothing=1"), tmp_path)


def test_what_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node, a task, the partition, and the signal before the time is up."""
    for name, text in (
        ("sbatch", 'echo "Submitted batch job 7"'),
        ("srun", "true"),
        ("sacct", "true"),
        ("scancel", "true"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    start = SlurmStarter(read_parameters("partition=gpu,gpus_per_node=4,timeout_min=240"), tmp_path / "jobs")
    run = start(Job("ewc 10 seed 0", tmp_path / "runs" / "seed0", ("--suite", "demo")), {})
    (script,) = (tmp_path / "jobs").rglob("*_submission.sh")
    lines = script.read_text()
    for line in ("--partition=gpu", "--gpus-per-node=4", "--time=240", "--signal=USR2@", "--job-name=ewc-10-seed-0"):
        assert f"#SBATCH {line}" in lines
    run.send_signal(signal.SIGTERM)
    assert run.cancelled  # type: ignore[attr-defined]


def test_a_job_that_slurm_does_not_take_costs_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("sbatch", 'echo "invalid partition specified" >&2; exit 1'), ("srun", "true")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    start = SlurmStarter(read_parameters("partition=none,timeout_min=5"), tmp_path / "jobs")
    job = Job("ewc seed 0", tmp_path / "seed0", ("--suite", "demo"))
    assert start(job, {}).wait() == 4
    (line,) = job.log.read_text().splitlines()
    assert line.startswith("error: it cannot be submitted: ")
    assert "invalid partition specified" in line
