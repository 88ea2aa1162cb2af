"""A run folder that 0.1.0 left (`run_of_0_1_0/`: its demo, two tasks, a network of 3k parameters) is still read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nostalgia import evaluate, figures, report
from tests.ranks import Ranks, run_train

OLD = Path(__file__).with_name("run_of_0_1_0")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_its_report_and_figures_are_made(old: Path) -> None:
    assert report.main([str(old)]) == 0
    page = (old / "results" / "report.html").read_text()
    assert "task2_digits" in page
    assert "nostalgia" in page
    assert figures.main([str(old)]) == 0
    drawn = {path.stem for path in (old / "results" / "figures").glob("*.png")}
    assert {"accuracy_matrix", "forgetting", "spectrum", "train_loss", "forgetting_prediction", "importance"} <= drawn


def test_it_is_evaluated_as_it_was(old: Path) -> None:
    assert evaluate.main([str(old)]) == 0
    found = json.loads((old / "results" / "evaluation.json").read_text())
    last = json.loads((old / "results" / "results.json").read_text())["accuracy_matrix"][-1]
    assert [task["accuracy"] for task in found["tasks"]] == pytest.approx(last)


def test_numbers_that_cannot_be_written_are_shown_and_the_option_is_named(old: Path, tmp_path: Path) -> None:
    words = [str(old), "--output", str(old / "config.yaml" / "numbers.json")]
    done = Ranks(evaluate.main, words, folder=tmp_path).wait()
    assert done.codes == [2]
    assert "task2_digits" in done.stdout
    assert "numbers.json: cannot be written (" in done.stderr
    assert "; name a file by --output" in done.stderr


def test_it_is_not_resumed_and_says_so(old: Path) -> None:
    done = run_train(["--resume", str(old)])
    assert done.codes == [2]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "begun by an earlier version" in line
