"""A run that is killed or stopped ends as if it had not been: short here, `python -m tests.faults.soak` at length."""

from __future__ import annotations

import signal

import pytest

from tests.faults.soak import Soak, main


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Soak:
    return Soak(tmp_path_factory.mktemp("soak"), "single", seed=0)


@pytest.mark.exhaustive
def test_a_killed_run_ends_as_if_it_had_not_been(soak: Soak) -> None:
    soak.kills(3)
    assert not soak.problems


@pytest.mark.exhaustive
def test_sigterm_stops_a_run_with_a_checkpoint(soak: Soak) -> None:
    soak.which = (signal.SIGTERM,)
    soak.signals(1)
    assert not soak.problems


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["kills", "signals", "disk", "crossing"])
def test_at_length(kind: str) -> None:
    assert main(["--only", kind]) == 0
