"""CSV logs: whole rows, going on after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest

from nostalgia.errors import NotFoundError
from nostalgia.logging.csv_log import METRICS_COLUMNS, CsvLog, column, read_log


def test_rows_are_there_without_closing(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "metrics.csv", METRICS_COLUMNS)
    log.write({"step": 1, "task": 'a,"b"', "split": "train", "loss": 0.1})
    (row,) = read_log(tmp_path / "metrics.csv")
    assert list(row) == list(METRICS_COLUMNS)
    assert (row["step"], row["task"], row["loss"], row["leak"]) == (1.0, 'a,"b"', 0.1, None)


def test_a_torn_row_is_mended_and_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    first = CsvLog(path, ("step", "loss"))
    first.write({"step": 1, "loss": 0.5})
    first.close()
    with path.open("a") as file:
        file.write("2,0.")
    assert [row["step"] for row in read_log(path)] == [1.0]
    again = CsvLog(path, ("step", "loss"))
    again.write({"step": 2, "loss": 0.25})
    assert path.read_text() == "step,loss\n1,0.5\n2,0.25\n"


def test_an_empty_file_gets_its_header(tmp_path: Path) -> None:
    (tmp_path / "log.csv").touch()
    CsvLog(tmp_path / "log.csv", ("step", "loss"))
    assert (tmp_path / "log.csv").read_text() == "step,loss\n"


def test_other_columns_are_refused(tmp_path: Path) -> None:
    CsvLog(tmp_path / "log.csv", ("step", "loss"))
    with pytest.raises(ValueError, match=r"has other columns \(step,loss\)"):
        CsvLog(tmp_path / "log.csv", ("step", "accuracy"))
    with pytest.raises(ValueError, match="no column accuracy"):
        CsvLog(tmp_path / "log.csv", ("step", "loss")).write({"accuracy": 1})


def test_non_finite_values_are_kept_but_not_drawn(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv", ("step", "loss"))
    for loss in (1.0, float("nan"), float("inf"), 2.0, None):
        log.write({"step": 1, "loss": loss})
    rows = read_log(tmp_path / "log.csv")
    assert len(rows) == 5
    assert column(rows, "loss") == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("step,loss\n1\n", "line 2: 1 values for 2 columns"),
        ("step,loss\n1,x\n", "line 2: not a number"),
        ("", "empty"),
    ],
)
def test_damaged_logs_are_named(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(NotFoundError, match=line):
        read_log(tmp_path / "log.csv")


def test_older_logs_with_fewer_columns_are_read(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step, loss\n1,0.5\n")
    assert read_log(tmp_path / "log.csv") == [{"step": 1.0, "loss": 0.5}]


def test_the_documents_name_every_column() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "runs.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| `metrics.csv` |")]
    assert row.split("|")[2].split(":")[0].strip().split(", ") == list(METRICS_COLUMNS)
