"""A rank that is stopped is named, and the others end, within the heartbeat's bound and some seconds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.harness import ROOT, cpu_environment, launch_command

BOUND = 3.0


def started(folder: Path, **environment: str) -> subprocess.Popen[str]:
    words = {"folder": str(folder), "heartbeat_seconds": BOUND}
    case = ("-m", "tests.distributed.worker", "tests.distributed.cases_failure:work_for_ever", json.dumps(words), "")
    return subprocess.Popen(
        [*launch_command(2), *case],
        cwd=ROOT,
        env=cpu_environment(NOSTALGIA_EXIT_FILE=str(folder / "code"), **environment),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def pids(folder: Path, launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of both ranks, once they work."""
    deadline = time.monotonic() + 60
    files = [folder / "pid0", folder / "pid1"]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
        time.sleep(0.1)
    return [int(file.read_text()) for file in files]


def seconds_until_gone(pid: int, limit: float) -> float:
    """How long ``pid`` goes on living."""
    since = time.monotonic()
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(limit)
    return time.monotonic() - since


@pytest.mark.parametrize("stopped", [1, 0], ids=["rank 1", "rank 0, which holds the store"])
def test_a_stopped_rank_is_named_and_ends_the_others(tmp_path: Path, stopped: int) -> None:
    launcher = started(tmp_path, **({} if stopped else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}))
    ranks = pids(tmp_path, launcher)
    try:
        if stopped == 1:
            all_stopped_and_continued(ranks)
            assert all(psutil.Process(pid).is_running() for pid in ranks)
            assert not (tmp_path / "code").exists()
        time.sleep(0.5)  # a round or two of heartbeats, so that each knows the other's host
        os.kill(ranks[stopped], signal.SIGSTOP)
        assert seconds_until_gone(ranks[1 - stopped], 20) < BOUND + 5
        assert (tmp_path / "code").read_text() == "4"
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # torchrun would, after 30 s
    assert launcher.wait(30) == 1
    assert launcher.stderr is not None
    text = launcher.stderr.read()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert lines[0].startswith(f"error: rank {stopped} (host ")
    assert f"has not answered for {BOUND:g} s" in lines[0]


def all_stopped_and_continued(ranks: list[int]) -> None:
    """As a laptop that sleeps, or Ctrl-Z and fg: nobody missed anything."""
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(BOUND + 1)
    for pid in reversed(ranks):
        os.kill(pid, signal.SIGCONT)
    time.sleep(BOUND)
