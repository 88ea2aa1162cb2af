"""Folders taken away, a full disk, no network: one warning, and everything else is logged."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from nostalgia.logging import trackers
from nostalgia.logging.csv_log import read_log
from nostalgia.logging.run_log import RunLog
from tests.unit.analysis.folders import results


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def log_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.train_step(step=step, task="task1_digits", epoch=1, loss=1.0 / step)


def test_a_tensorboard_folder_taken_away_costs_one_line(
    tmp_path: Path, accelerator: Accelerator, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    log = RunLog(tmp_path, accelerator, warn=said.append)
    log_steps(log, 1, 2)
    shutil.rmtree(tmp_path / "tensorboard")
    log_steps(log, 3, 20)
    log.finish(results())
    (line,) = said
    assert line.startswith("tensorboard tracker stopped, the run goes on without it: ")
    assert "not there any more" in line
    assert [row["step"] for row in read_log(tmp_path / "metrics.csv")] == list(range(1, 21))
    assert "Traceback" not in capfd.readouterr().err


def test_the_writer_of_tensorboard_dies_without_a_traceback(
    tmp_path: Path, accelerator: Accelerator, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the check of the folder misses (a disk that is full) breaks the writer's own thread."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    monkeypatch.setattr(trackers, "check_there", lambda path: None)
    said: list[str] = []
    log = RunLog(tmp_path, accelerator, warn=said.append)
    log_steps(log, 1, 2)
    shutil.rmtree(tmp_path / "tensorboard")
    for step in range(3, 40):
        log_steps(log, step, step)
        time.sleep(0.01)
    (line,) = said
    assert "tensorboard tracker stopped" in line
    assert "Traceback" not in capfd.readouterr().err
    other = threading.Thread(target=lambda: 1 / 0)
    other.start()
    other.join()
    assert "ZeroDivisionError" in capfd.readouterr().err  # other threads still speak


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_the_csv_one_line(tmp_path: Path, accelerator: Accelerator) -> None:
    said: list[str] = []
    log = RunLog(tmp_path, accelerator, warn=said.append)
    log_steps(log, 1, 2)
    accelerator.get_tracker("csv").tracker._file = open("/dev/full", "w")  # noqa: SIM115
    log_steps(log, 3, 5)
    log.finish(results())
    (line,) = said
    assert line.startswith("csv tracker stopped, the run goes on without it: [Errno 28] No space left")
    assert [row["step"] for row in read_log(tmp_path / "metrics.csv")] == [1, 2]


def test_wandb_without_a_network_is_waited_for_once(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(trackers, "WANDB_START_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    said: list[str] = []
    started = time.monotonic()
    log = RunLog(tmp_path, accelerator, wandb={"mode": "online"}, tensorboard=False, warn=said.append)
    log_steps(log, 1, 5)
    log.finish(results())
    wandb.teardown()  # its process keeps the key
    assert time.monotonic() - started < 20
    (line,) = said
    assert line.startswith("wandb tracker stopped, the run goes on without it: ")
    assert len(read_log(tmp_path / "metrics.csv")) == 5


def test_wandb_has_limits_for_its_start_and_its_end() -> None:
    wandb = pytest.importorskip("wandb")
    limit = trackers._upload_limit(wandb.Settings)
    assert wandb.Settings(**limit) is not None
    if "finish_timeout" in wandb.Settings.model_fields:
        assert limit["finish_timeout"] == trackers.WANDB_FINISH_SECONDS
    assert trackers._upload_limit(object) == {}
