"""Results files: round trip, whole or absent, damage named in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nostalgia.errors import NotFoundError
from nostalgia.logging.results import read_matrix_csv, read_results, write_results
from nostalgia.utils import files
from tests.unit.analysis.folders import MATRIX, TASKS, results


def test_round_trip_and_the_three_files(tmp_path: Path) -> None:
    written = results()
    paths = write_results(tmp_path, written)
    assert read_results(tmp_path) == written
    assert read_results(paths["results.json"]) == written
    assert json.loads((tmp_path / "per_task_acc.json").read_text()) == [0.6, 0.7, 0.85]
    assert read_matrix_csv(tmp_path / "accuracy_matrix.csv") == (TASKS, MATRIX)
    assert (tmp_path / "accuracy_matrix.csv").read_text().splitlines()[:2] == [
        "after_training,task1_digits,task2_digits,task3_mnist",
        "task1_digits,0.9,,",
    ]


def test_measures_are_computed_from_the_accuracies() -> None:
    written = results()
    assert written.acc == pytest.approx((0.6 + 0.7 + 0.85) / 3)
    assert written.bwt == pytest.approx(-0.2)
    assert written.forgetting == pytest.approx(0.225)
    assert written.learning_accuracy == pytest.approx(0.85)
    assert written.fwt == pytest.approx(0.1)


def test_a_matrix_under_way_is_filled_to_the_number_of_tasks() -> None:
    under_way = results(accuracy_matrix=[[0.9], [0.95, 0.8]])
    assert under_way.accuracy_matrix == [[0.9, None, None], [0.95, 0.8, None], [None] * 3]
    assert under_way.final_accuracies() == [0.95, 0.8, None]


def test_a_file_without_the_measures_has_them_computed(tmp_path: Path) -> None:
    write_results(tmp_path, results())
    content = json.loads((tmp_path / "results.json").read_text())
    for name in ("acc", "bwt", "forgetting", "learning_accuracy", "fwt", "classes", "details"):
        del content[name]
    (tmp_path / "results.json").write_text(json.dumps({**content, "of_a_later_version": 1}))
    read = read_results(tmp_path)
    assert read.metrics() == results().metrics()
    assert read.classes == [[], [], []]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"accuracy_matrix": MATRIX[:2]}, "must be 3 x 3 for 3 tasks, found 2 rows"),
        (
            {"accuracy_matrix": [[0.9], [0.9, 0.8], [0.9, 0.8, 0.7]]},
            "accuracy_matrix row 1 must be a list of 3",
        ),
        ({"accuracy_matrix": [[90.0, None, None], *MATRIX[1:]]}, "holds 90.0, an accuracy is a fraction"),
        ({"accuracy_matrix": [["x", None, None], *MATRIX[1:]]}, "holds 'x'"),
        ({"accuracy_matrix": [[float("nan"), None, None], *MATRIX[1:]]}, "holds nan"),
        ({"before_accuracies": [0.1]}, "before_accuracies must be a list of 3"),
        ({"tasks": []}, "tasks must be a list of names"),
        ({"acc": "high"}, "acc must be a number or null, found 'high'"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    write_results(tmp_path, results())
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(NotFoundError, match=line) as caught:
        read_results(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"tasks": ["a"], "acc', "", "[1]", '{"x": 1}'])
def test_a_torn_or_foreign_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(NotFoundError, match=r"results\.json"):
        read_results(tmp_path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="cannot be read"):
        read_results(tmp_path / "results.json")


def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results(tmp_path, results(seconds=float("nan")))
    assert not (tmp_path / "results.json").exists()


def test_a_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    files.write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    files.write_atomic(tmp_path / "atomic", b"x")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


def test_json_is_for_people_too() -> None:
    value = {"a": [[1, 2], [3, None]], "b": {"c": {}, "d": "ü"}, "e": []}
    text = files.dump_json(value)
    assert json.loads(text) == value
    assert "    [1, 2],\n" in text
