"""The command line from outside: a whole small run, one process against two, and refusals with their exit codes."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nostalgia.experiment import resume
from nostalgia.methods import gpm
from tests import ranks
from tests.ranks import Finished, run, run_train

SMALL = (
    "--suite", "demo", "--quiet", "train.epochs=2", "train.head_warmup_epochs=1", "train.max_steps_per_epoch=7",
    "nostalgia.top_k=4", "nostalgia.num_samples=64", "nostalgia.tol=0.1", "train.log_every_n_steps=1",
    "nostalgia.guard_every_n_steps=5",
)  # fmt: skip

LAYERS = 13  # with a weight matrix, of the demo's network

SECRETS = {"WANDB_API_KEY": "secret123", "HF_TOKEN": "secret456"}  # in the environment of every run here


def train(folder: Path, *words: str, processes: int = 1) -> Finished:
    return run_train([f"experiment.output_dir={folder / 'runs'}", *words], processes, environment=SECRETS)


def results(folder: Path) -> dict:
    return json.loads((folder / "runs" / "latest" / "results" / "results.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same short demo at the same global batch, on one process and on two."""
    folders = {}
    for processes, batch in ((1, 32), (2, 16)):
        folder = tmp_path_factory.mktemp(f"ranks{processes}")
        words = [*SMALL, f"dataset.batch_size={batch}", f"logger.report={processes == 2}"]
        done = train(folder, *words, processes=processes)
        assert not any(done.codes), done.stdout + done.stderr
        folders[processes] = folder
    return folders


def test_a_run_leaves_its_files(runs: dict[int, Path]) -> None:
    folder = runs[2] / "runs" / "latest"
    found = results(runs[2])
    assert [len(row) for row in found["accuracy_matrix"]] == [3, 3, 3]
    assert found["accuracy_matrix"][0][1] is None
    assert found["world_size"] == 2
    assert found["fwt"] is not None
    for name in ("config.yaml", "metrics.csv", "memory.csv", "tensorboard", "curvature/task1.json",
                 "curvature/task2.safetensors", "curvature/task2_factors.safetensors",
                 "results/per_task_acc.json", "results/accuracy_matrix.csv",
                 "results/figures/accuracy_matrix.png", "results/figures/spectrum.png", "results/report.html",
                 "results/figures/importance.png", "results/figures/forgetting_prediction.png"):  # fmt: skip
        assert (folder / name).exists(), name
    assert not list((folder / "curvature").glob("task3*"))  # of the last task only on request: no later one uses it


def test_two_processes_are_one(runs: dict[int, Path]) -> None:
    """Every logged training loss to 1e-4 while parameters can still agree, and accuracies within two samples."""
    losses = []
    for folder in runs.values():
        rows = [line.split(",") for line in (folder / "runs/latest/metrics.csv").read_text().splitlines()]
        head = rows[0]
        train_rows = [r for r in rows[1:] if r[head.index("split")] == "train"]
        losses.append([float(r[head.index("loss")]) for r in train_rows[:40]])
    assert len(losses[0]) == 40
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    sizes = (180, 179, 359)
    for one, two in zip(*(results(f)["accuracy_matrix"] for f in runs.values()), strict=True):
        for a, b, size in zip(one, two, sizes, strict=True):
            assert a is None or abs(a - b) * size <= 2.01


def test_forgetting_is_predicted_and_the_same_on_two_processes(runs: dict[int, Path]) -> None:
    one, two = (
        json.loads((f / "runs/latest/results/forgetting_prediction.json").read_text())["rows"] for f in runs.values()
    )
    pairs = [(row["task"], row["after"]) for row in one]
    assert pairs == [
        ("task1_digits", "task2_digits"),
        ("task1_digits", "task3_digits"),
        ("task2_digits", "task3_digits"),
    ]
    for a, b in zip(one, two, strict=True):
        assert a["predicted"] == pytest.approx(a["linear"] + a["kronecker"])
        assert a["inside"] <= 1e-6 * a["bound"]  # the steps were projected
        assert (a["measured"], a["predicted"]) == pytest.approx((b["measured"], b["predicted"]), abs=5e-3)


def test_keys_in_the_environment_are_in_no_file(runs: dict[int, Path]) -> None:
    files = [path for folder in runs.values() for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        assert not any(value.encode() in path.read_bytes() for value in SECRETS.values()), path


def test_leak_is_rounding(runs: dict[int, Path]) -> None:
    rows = [line.split(",") for line in (runs[2] / "runs/latest/metrics.csv").read_text().splitlines()]
    place, split = rows[0].index("leak"), rows[0].index("split")
    leaks = [float(r[place]) for r in rows[1:] if r[place] and r[split] == "val"]
    assert len(leaks) == 4  # two epochs each of tasks 2 and 3
    assert max(leaks) <= 1e-5


def test_joint_fills_the_last_row(tmp_path: Path) -> None:
    done = train(tmp_path, *SMALL, "method=joint", "train.epochs=1", "logger.report=false")
    assert not any(done.codes), done.stderr
    matrix = results(tmp_path)["accuracy_matrix"]
    assert matrix[0] == matrix[1] == [None] * 3
    assert all(a is not None for a in matrix[2])


def test_a_run_that_is_refused_is_not_the_latest(tmp_path: Path) -> None:
    """Its data is read once its folder is there."""
    (tmp_path / "runs" / "good").mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to("good")
    done = train(tmp_path, *SMALL, "experiment.tasks=[{dataset: digits, classes: [ten]}]")
    assert done.codes == [2]
    assert (tmp_path / "runs" / "latest").readlink() == Path("good")


def test_dry_run_trains_nothing(tmp_path: Path) -> None:
    done = train(tmp_path, "--suite", "demo", "--dry-run")
    assert not any(done.codes), done.stderr
    assert "task3_digits" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_goes_away_ends_in_one_line(tmp_path: Path) -> None:
    """A file where a result's folder has to be made stands for any disk that stops taking writes."""
    done = run(blocked, [*SMALL, "--debug", f"experiment.output_dir={tmp_path / 'runs'}"])
    assert done.codes == [4]
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def stopped_within_gpm(words: list[str]) -> int:
    """The program, told to stop while gpm takes in the third layer of the second task's end."""
    original, calls = gpm.grown_span, itertools.count(1)

    def grown_span(*given: Any) -> Any:
        if next(calls) == LAYERS + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    gpm.grown_span = grown_span
    return ranks.train(words)


def test_a_stop_between_two_layers_of_gpm_loses_nothing(tmp_path: Path) -> None:
    words = [*SMALL, "method=gpm", "train.epochs=1", "train.max_steps_per_epoch=2", "logger.report=false"]
    whole = train(tmp_path / "whole", *words)
    assert not any(whole.codes), whole.stderr
    folder = tmp_path / "stopped" / "runs"
    assert run(stopped_within_gpm, [*words, f"experiment.output_dir={folder}"]).codes == [75]
    assert any(path.name.endswith("task2_end") for path in (folder / "latest" / "checkpoints").iterdir())
    again = run_train(["--resume", str((folder / "latest").resolve())])
    assert not any(again.codes), again.stderr
    assert results(tmp_path / "stopped")["accuracy_matrix"] == results(tmp_path / "whole")["accuracy_matrix"]


def blocked(words: list[str]) -> int:
    """The program, with a file in the way of the curvature's folder."""
    original = resume.make_run_folder

    def make_run_folder(*given: Any) -> Path:
        folder = original(*given)
        (folder / "curvature").write_text("in the way")
        return folder

    resume.make_run_folder = make_run_folder
    return ranks.train(words)
