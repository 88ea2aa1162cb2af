"""A run that is killed or stopped ends as if it had not been: short here, `python -m tests.faults.soak` at length."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.distributed.harness import ROOT, cpu_environment


def soak(*words: str, timeout: float) -> None:
    """In a process of its own, which has started no thread when it forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.soak", *words],
        cwd=ROOT, env=cpu_environment(), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_killed_run_ends_as_if_it_had_not_been() -> None:
    soak("--only", "kills", "--kills", "2", "--ways", "single", timeout=250)


def test_sigterm_stops_a_run_with_a_checkpoint() -> None:
    soak("--only", "signals", "--signals", "1", "--which", "SIGTERM", "--ways", "single", timeout=250)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["kills", "signals", "disk", "crossing"])
def test_at_length(kind: str) -> None:
    soak("--only", kind, timeout=3500)
