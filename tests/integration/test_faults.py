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
from tests.unit.data.trees import write_tree

TEXTS = (".json", ".yaml", ".csv", ".html", ".md")


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_nan_in_one_batch_on_one_rank_stops_all(tmp_path: Path) -> None:
    place = (1, "task2_digits", 2, 3, tmp_path / "sample")  # rank, task, epoch, step
    words = [*SMALL, "--debug", "train.max_steps_per_epoch=4", "train.epochs=2", "nostalgia.guard_every_n_steps=0"]
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


@pytest.mark.exhaustive
def test_files_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    """Names of folders, classes and runs in any alphabet, and no file opened in the encoding of the locale."""
    folder = write_tree(tmp_path / "Größen", ("naïve", "日本"), train=8, val=4)
    words = [
        f"experiment.tasks=[{folder}]", "model=vit_tiny", "dataset.image_size=8", "train.epochs=1", "dataset.batch_size=8",
        "train.accelerator=cpu", "method=finetune", "dataset.num_workers=0", "logger.name=für",
    ]  # fmt: skip
    plain = {"LC_ALL": "POSIX", "PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "always::EncodingWarning"}
    command = [sys.executable, "-m", "nostalgia.train", *words, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=cpu_environment(**plain), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "EncodingWarning" in line]
    assert [line for line in warned if f"{ROOT}/nostalgia/" in line] == []
    texts = {path: path.read_text(encoding="utf-8") for path in (tmp_path / "run").rglob("*.*") if path.suffix in TEXTS}
    named = {path.name for path, text in texts.items() if "日本" in text}
    assert {"classes.json", "README.md"} <= named
    assert "für" in texts[tmp_path / "run/config.yaml"]
    assert "Größen" in texts[tmp_path / "run/results/report.html"]
