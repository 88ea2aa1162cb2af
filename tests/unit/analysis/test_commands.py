"""figures and compare on run folders as they are found: finished, broken off, old, empty."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from nostalgia import figures, report
from nostalgia.analysis import compare
from nostalgia.analysis.aggregate import by_method, read_finished, summarise
from nostalgia.analysis.run_folder import read_run
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.scripts import plot_all
from tests.unit.analysis.folders import MATRIX, TASKS, write_metrics, write_run

FIGURES = {
    "accuracy_vs_task",
    "forgetting",
    "average_accuracy",
    "accuracy_matrix",
    "train_loss",
    "memory",
    "spectrum",
    "subspace_overlap",
    "importance",
    "curvature_share",
    "forgetting_prediction",
    "projection",
    "throughput",
}


def test_a_finished_run_gets_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert figures.main([str(run)]) == 0
    made = {path.stem for path in (run / "results" / "figures").glob("*.png")}
    assert made >= FIGURES
    assert "not made" not in capsys.readouterr().out


def test_a_run_that_broke_off_is_drawn_from_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, TASKS[:2])
    assert plot_all.main(["--results_dir", str(tmp_path / "results")]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "results" / "figures" / "accuracy_matrix.png").exists()
    assert f"{'memory':<25} not made: {tmp_path / 'memory.csv'} is not there" in out
    run = read_run(tmp_path)
    assert (run.tasks, run.matrix) == (TASKS[:2], [row[:2] for row in MATRIX[:2]])


def test_a_damaged_file_costs_its_figures_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "curvature" / "task2.json").write_text('{"task": "x", "eigenva')
    (run / "memory.csv").write_text("time,step\n1,x\n")
    (run / "results" / "results.json").write_text("{")
    drawn = figures.draw(run)
    assert set(drawn.skipped) == {"memory"}
    assert "line 2: not a number" in drawn.skipped["memory"]
    read = read_run(run)
    assert read.matrix == MATRIX
    assert [c.index for c in read.curvature] == [1, 3]
    assert set(read.problems) == {"task2.json", "memory.csv", "results.json"}


def test_other_logs_can_be_given(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.csv").rename(tmp_path / "elsewhere.csv")
    assert "train_loss" in figures.draw(run).skipped
    drawn = figures.draw(run, log_csv=tmp_path / "elsewhere.csv")
    assert "train_loss" in drawn.made


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--results_dir", "nowhere/results"], 3, "no such folder"),
        (["--results_dir", "empty"], 3, "nothing to draw"),
        (["--results_dir", "empty", "--log_csv", "none.csv"], 3, "none.csv: no such file"),
    ],
)
def test_refusals(
    arguments: list[str],
    code: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert plot_all.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert line in error
    assert error.count("\n") == 1


def test_figures_that_cannot_be_written_are_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (run / "results" / "figures").write_text("a file in the way")
    assert plot_all.main(["--results_dir", str(run / "results")]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("command", [plot_all.main, figures.main, report.main])
def test_no_arguments_are_wrong_usage(command: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command([]) == 2
    assert "required" in capsys.readouterr().err


def test_seeds_are_averaged_within_a_method(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"n{seed}", seed=seed, shift=0.1 * seed) for seed in (0, 1, 2)]
    paths.append(write_run(tmp_path / "f", method="finetune", shift=0.3))
    rows = by_method(read_finished(paths[::-1]))
    assert [(row.method, row.seeds) for row in rows] == [("nostalgia", (0, 1, 2)), ("finetune", (0,))]
    acc = rows[0].values["acc"]
    assert acc is not None
    assert (acc.mean, acc.std, acc.count) == (pytest.approx(2.15 / 3 - 0.1), pytest.approx(0.1), 3)
    assert rows[1].values["acc"].text() == "0.417"  # type: ignore[union-attr]


def test_a_missing_value_is_not_averaged_over() -> None:
    assert summarise([0.5, None]) is None
    assert summarise([]) is None


def test_compare_prints_one_table_and_the_paths(tmp_path: Path) -> None:
    nostalgia, finetune = write_run(tmp_path / "n"), write_run(tmp_path / "f", method="finetune", shift=0.3)
    figures.draw(nostalgia)
    stream = io.StringIO()
    compare.compare([nostalgia, finetune, nostalgia], Console(file=stream, width=80, color_system=None))
    given = [
        str(tmp_path / name) for name in ("f", "f.log", "n", "n.log")
    ]  # as a star finds them beside a sweep's logs
    assert figures.main([*given, "--out", str(tmp_path / "figs")]) == 0
    text = stream.getvalue()
    words = [line.split() for line in text.splitlines()]
    assert ["nostalgia", "0", "0.717", "-", "-0.200", "0.225", "0.850", "0.100", "60.0", "-", "-"] in words
    assert ["finetune", "0", "0.417", "-", "-0.200", "0.225", "0.550", "0.100", "60.0", "-", "-"] in words
    assert ["figures", str(nostalgia / "results" / "figures")] in words
    assert (tmp_path / "figs" / "average_accuracy.png").exists()
    assert "note:" not in text


def test_compare_says_what_does_not_compare(tmp_path: Path) -> None:
    first, again = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    other = write_run(tmp_path / "c", method="finetune", tasks=["x", "y", "z"])
    stream = io.StringIO()
    compare.compare([first, again, other], Console(file=stream, width=200))
    with pytest.raises(UsageError, match="their tasks are not the same"):
        compare.draw_side_by_side([first, again, other], tmp_path / "figs")
    assert "note: the runs have different tasks" in stream.getvalue()
    assert "note: nostalgia: several runs have the same seed" in stream.getvalue()
    assert not (tmp_path / "figs").exists()
    path = again / "results" / "results.json"
    raw = json.loads(path.read_text())
    raw["classes"][0] = [*raw["classes"][0], "one more"]
    path.write_text(json.dumps(raw))
    compare.compare([first, again], Console(file=stream, width=200))
    assert f"of {len(raw['classes'][0]) - 1} classes" in stream.getvalue()
    path.write_text(
        json.dumps({**raw, "classes": [[] for _ in raw["tasks"]]})
    )  # as old runs are read, which do not say
    later = io.StringIO()
    compare.compare([first, again], Console(file=later, width=200))
    assert "different tasks" not in later.getvalue()


def images(names: list[str]) -> dict[str, object]:
    return {"images": len(names), "digest": "", "classes": {}, "names": names}


def compared(*folders: Path) -> str:
    stream = io.StringIO()
    compare.compare(list(folders), Console(file=stream, width=400))
    return stream.getvalue()


def test_compare_says_where_the_images_are_others(tmp_path: Path) -> None:
    """Which of them a task trains and validates on may depend on the seed."""
    one, two, old = (write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b", "c")))
    (one / "data.json").write_text(json.dumps({"t1": {"training": images(["1", "2"]), "validation": images(["3"])}}))
    again = {"t1": {"training": images(["3", "2"])}, "t2": {"validation": images(["1"])}}
    (two / "data.json").write_text(json.dumps(again))
    assert "different images" not in compared(one, two, old)
    again["t2"]["validation"] = images(["4"])
    (two / "data.json").write_text(json.dumps(again))
    assert f"note: the runs saw different images ({one} of 3, {two} of 3)" in compared(one, two, old)


def test_compare_says_where_processes_are_more(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{ranks}", seed=ranks, world_size=ranks) for ranks in (1, 2)]
    assert "note: the runs are of 1 and 2 processes" in compared(*runs)
    assert "processes" not in compared(runs[0])


def test_classes_of_one_name_are_two_methods(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{i}", method="Mine", seed=i % 2) for i in range(4)]
    for i, run in enumerate(runs):
        (run / "config.yaml").write_text(f"method:\n  name: {'ab'[i // 2]}.mine:Mine\n")
    rows = by_method(read_finished(runs))
    assert [(row.method, row.seeds) for row in rows] == [("a.mine:Mine", (0, 1)), ("b.mine:Mine", (0, 1))]
    assert [row.method for row in by_method(read_finished(runs[:2]))] == ["Mine"]


def test_compare_refuses_a_folder_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "results")
    assert figures.main([str(run), str(run)]) == 3
    assert "no results to compare" in capsys.readouterr().err
    with pytest.raises(NotFoundError, match="no such run folder"):
        read_finished([tmp_path / "nowhere"])


def test_the_report_of_several_runs_prints_their_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", method="finetune", shift=0.3)
    assert report.main([str(first), str(other), "--out", str(tmp_path / "page.html")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "page.html")
    assert any(line.split()[:2] == ["finetune", "0"] for line in lines)
    damaged = write_run(tmp_path / "c", method="ewc")
    (damaged / "results" / "results.json").write_text("{")
    words = [str(first), str(other), str(damaged), "--out", str(tmp_path / "page.html")]
    assert report.main(words) == 0
    assert any(line.split()[:2] == ["finetune", "0"] for line in capsys.readouterr().out.splitlines())
