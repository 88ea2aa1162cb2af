"""Faults while a run is under way: each ends it in bounded time, with one line and the right code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.harness import ROOT, cpu_environment
from tests.integration import nan_batch
from tests.integration.test_train import SMALL
from tests.ranks import run


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_nan_in_one_batch_on_one_rank_stops_all(tmp_path: Path) -> None:
    place = (1, "task2_digits", 2, 3, tmp_path / "sample")  # rank, task, epoch, step
    words = [*SMALL, "--debug", "train.epochs=2", "nostalgia.guard_every_n_steps=0"]
    done = run(nan_batch.main, *place, [*words, f"experiment.output_dir={tmp_path / 'runs'}"], world_size=2)
    assert done.codes == [4, 4], done.stderr
    (line,) = error_lines(done.stderr)
    assert line.startswith("error: task2_digits, epoch 2, step 3: loss is not finite (samples ")
    samples = line.split("(samples ")[1].split(")")[0].split(", ")
    assert (tmp_path / "sample").read_text() in samples
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_rank_stopped_in_mid_training_ends_the_launch_with_4(tmp_path: Path) -> None:
    """As `tests/distributed/test_failure.py`, through the launch script to its very end: torchrun waits 30 s."""
    bound = 5.0
    environment = cpu_environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    launch = subprocess.Popen(
        [ROOT / "launch" / "ddp.sh", *SMALL, "train.epochs=500", f"train.heartbeat_seconds={bound}",
         f"experiment.output_dir={tmp_path / 'runs'}"],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "runs" / "latest" / "metrics.csv"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count(",train,") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    processes = psutil.Process(launch.pid).children(recursive=True)
    rank1 = next(p for p in processes if p.environ().get("RANK") == "1" and "nostalgia.train" in p.cmdline())
    rank1.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert launch.wait(120) == 4
    assert time.monotonic() - stopped < bound + 5 + 45
    assert launch.stderr is not None
    (line,) = error_lines(launch.stderr.read())
    assert line.startswith("error: rank 1 (host ")
    assert not rank1.is_running()
