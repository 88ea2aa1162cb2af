"""A rank that is stopped is named, and the others end, within the heartbeat's bound and some seconds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.cases_failure import work_for_ever
from tests.ranks import Ranks

BOUND = 3.0


@pytest.mark.parametrize(
    "stopped",
    [pytest.param(1, id="rank 1", marks=pytest.mark.exhaustive), pytest.param(0, id="rank 0, which holds the store")],
)
def test_a_stopped_rank_is_named_and_ends_the_others(tmp_path: Path, stopped: int) -> None:
    ranks = Ranks(work_for_ever, tmp_path, BOUND, world_size=2, folder=tmp_path)
    try:
        until_they_work(ranks, tmp_path)
        if stopped == 1:
            all_stopped_and_continued(ranks)
            assert all(process.is_alive() for process in ranks.processes)
        time.sleep(0.5)  # a round or two of heartbeats, so that each knows the other's host
        os.kill(ranks.processes[stopped].pid, signal.SIGSTOP)
        other = ranks.processes[1 - stopped]
        other.join(BOUND + 5)
        assert other.exitcode == 4
    finally:
        ranks.kill()  # torchrun would, after 30 s
    lines = [line for line in (tmp_path / "stderr").read_text().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: rank {stopped} (host ")
    assert f"has not answered for {BOUND:g} s" in lines[0]


def until_they_work(ranks: Ranks, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not all((folder / f"working{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in ranks.processes), (folder / "stderr").read_text()
        time.sleep(0.1)


def all_stopped_and_continued(ranks: Ranks) -> None:
    """As a laptop that sleeps, or Ctrl-Z and fg: nobody missed anything."""
    ranks.send(signal.SIGSTOP)
    time.sleep(BOUND + 1)
    ranks.send(signal.SIGCONT)
    time.sleep(BOUND)
