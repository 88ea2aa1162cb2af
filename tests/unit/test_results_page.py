"""Every number of the page of results is one of the files of results beside it."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from bench.study import table

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_table_of_the_study_is_made_of_its_runs() -> None:
    assert table(json.loads((DOCS / "results" / "study.json").read_text())) in (DOCS / "results.md").read_text()


def test_the_runs_of_the_study_are_what_their_accuracy_matrices_say() -> None:
    runs = json.loads((DOCS / "results" / "study.json").read_text())["runs"]
    assert len(runs) == 130
    for run in runs:
        matrix = run["accuracy_matrix"]
        last, count = matrix[-1], len(matrix)
        changes = [last[task] - matrix[task][task] for task in range(count - 1)]
        assert math.isclose(run["acc"], statistics.fmean(last), abs_tol=1e-12)
        assert math.isclose(run["bwt"], statistics.fmean(changes), abs_tol=1e-12)


def test_every_number_of_the_measured_table_is_one_of_its_file() -> None:
    points = json.loads((DOCS / "results" / "split_digits_frontier.json").read_text())["points"]
    part = (DOCS / "results.md").read_text().split("<!-- measured: begin -->")[1]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")
    ]
    names, table_rows = rows[0], rows[1:]
    assert {row[0] for row in table_rows} == {point["method"] for point in points}
    columns = {"ACC": "acc", "BWT": "bwt", "LA": "learning_accuracy", "class-inc": "class_incremental"}
    for row in table_rows:
        point = the_point(points, row)
        for column, key in columns.items():
            mean, error = point["mean"][key], point["error"][key]
            assert row[names.index(column)] == ("-" if mean is None else f"{mean:.3f} ± {error:.3f}"), row
        assert row[names.index("bytes")] == f"{point['mean']['bytes'] / 1e6:.1f} MB"
        assert row[names.index("s")] == f"{point['mean']['seconds']:.0f}"


def the_point(points: list[dict[str, Any]], row: list[str]) -> dict[str, Any]:
    shown = re.sub("[ *]", "", row[1])
    strength = None if shown == "-" else float(shown)
    (point,) = [point for point in points if point["method"] == row[0] and point["strength"] == strength]
    return point
