"""Every number of the page of results is one of the files of results beside it."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

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
