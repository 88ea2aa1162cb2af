"""Silence is told from being busy, slow, or asleep together."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from nostalgia.parallel.heartbeat import ROUNDS, Beat, Heartbeats
from nostalgia.utils.exit_code import already_ended


def watcher(rank: int = 0, world_size: int = 3, bound: float = 12.0) -> Heartbeats:
    return Heartbeats(rank, world_size, bound)


def beats(count: int, *ranks: int) -> dict[int, Beat]:
    return {rank: Beat(count, f"host{rank}") for rank in ranks}


def test_a_rank_that_counts_on_is_never_silent() -> None:
    watch = watcher()
    for count in range(100):
        watch.heard(beats(count, 0, 1, 2))
        watch.waited()
        assert watch.complaint() is None


def test_a_rank_that_stops_counting_is_named_with_its_host() -> None:
    watch = watcher()
    watch.heard({**beats(1, 0, 1, 2)})
    for count in range(2, ROUNDS + 2):
        watch.heard({**beats(count, 0, 1), **beats(1, 2)})
        assert watch.complaint() is None
    watch.heard({**beats(99, 0, 1), **beats(1, 2)})
    assert watch.silent_ranks() == [2]
    assert (watch.complaint() or "").startswith("rank 2 (host host2) has not answered for 12 s: it is stopped")


def test_all_ranks_of_a_machine_that_is_gone_are_named() -> None:
    watch = watcher()
    for count in range(ROUNDS + 2):
        watch.heard({**beats(count, 0), **{r: Beat(1, "far") for r in (1, 2)}})
    assert (watch.complaint() or "").startswith("ranks 1, 2 (host far) have not answered")


def test_a_rank_that_never_began_is_named() -> None:
    watch = watcher()
    for count in range(ROUNDS + 1):
        watch.heard(beats(count, 0, 1))
    assert watch.silent_ranks() == [2]


def test_a_rank_that_comes_back_in_time_starts_afresh() -> None:
    watch = watcher()
    for count in range(5 * ROUNDS):
        watch.heard({**beats(count, 0, 1), **beats(count // (ROUNDS - 1), 2)})
        assert watch.complaint() is None


def test_a_store_that_is_silent_is_not_blamed_on_its_other_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing is heard no rank gets older; then it is the holder of the store that is named."""
    watch = watcher(rank=1)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    watch.heard(beats(1, 0, 1, 2))
    for _ in range(ROUNDS):
        watch.waited()
        assert watch.complaint() is None
    watch.waited()
    assert watch.silent_ranks() == []
    assert (watch.complaint() or "").startswith("rank 0 (host host0) has not answered")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert (watch.complaint() or "").startswith("the launcher on node7 has not answered")
    watch.heard(beats(2, 0, 1, 2))
    assert watch.complaint() is None


@pytest.mark.parametrize(
    ("first_host", "agent", "local_rank", "speaks"),
    [("here", "False", "1", True), ("far", "False", "0", True),
     ("far", "False", "1", False), ("here", "True", "0", True), ("here", "True", "1", False)],
)  # fmt: skip
def test_one_rank_a_machine_speaks(
    monkeypatch: pytest.MonkeyPatch, first_host: str, agent: str, local_rank: str, speaks: bool
) -> None:
    watch = watcher(rank=1)
    host = socket.gethostname() if first_host == "here" else "far"
    watch.heard({0: Beat(1, host), **beats(1, 1, 2)})
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert watch.speaks_alone() is speaks


def test_beats_go_through_a_store() -> None:
    store = dist.HashStore()
    watches = [watcher(rank) for rank in range(3)]
    for _ in range(3):
        for watch in watches:
            watch.exchange(store)
    assert watches[0].last[2] == Beat(2, socket.gethostname())  # as rank 0 saw it before rank 2's third
    assert all(watch.complaint() is None for watch in watches)


def test_a_restart_after_a_code_that_stands_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "code"
    file.write_text("4")
    monkeypatch.setenv("NOSTALGIA_EXIT_FILE", str(file))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert not already_ended()  # the first attempt: a file of an earlier launch says nothing
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert already_ended()
    file.write_text("")
    assert not already_ended()
