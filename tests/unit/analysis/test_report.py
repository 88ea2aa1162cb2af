"""The report: its numbers against numpy alone, its text inert, its folders as they are found."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from nostalgia import report
from nostalgia.analysis.aggregate import by_method, doubts, read_finished
from nostalgia.analysis.report import write_report
from nostalgia.analysis.report.tables import escape_latex, escape_markdown
from nostalgia.analysis.report.words import significant
from nostalgia.analysis.settings import differences, flat, text_of
from nostalgia.errors import NotFoundError
from nostalgia.scripts import plot_all
from tests.unit.analysis.folders import TASKS, write_forgetting, write_metrics, write_run
from tests.unit.analysis.pages import read_page

FIGURES = {
    "accuracy_matrix", "accuracy_vs_task", "forgetting", "average_accuracy", "spectrum", "curvature_share",
    "subspace_overlap", "importance", "projection", "forgetting_prediction", "train_loss", "throughput", "memory",
}  # fmt: skip
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report."""
    folder = write_run(tmp_path_factory.mktemp("finished") / "run")
    assert write_report([folder]) == folder / "results" / "report.html"
    return folder


def begun(folder: Path, config: dict | None = None) -> Path:
    """A run that has written its configuration and nothing that could be drawn."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config or {"method": {"name": "nostalgia"}}))
    return folder


def test_a_finished_run_shows_everything(run: Path) -> None:
    page = read_page(run / "results" / "report.html")
    assert set(page.pictures) == FIGURES
    assert all(len(alt) > 20 for alt in page.pictures.values())
    assert page.headings == [
        "Accuracy", "Forgetting, predicted and measured", "Curvature", "Training", "Configuration", "Environment",
    ]  # fmt: skip
    assert page.tables["Accuracy on each task"][1] == ["task1_digits", "0.900", "0.950", "0.600", "0.350"]
    assert page.tables["Increase of the loss of finished tasks"][1] == [
        "task1_digits", "task2_digits", "0.02", "0.015", "0.01", "1e-09", "0.005", "-", "0.4", "1.25",
    ]  # fmt: skip
    for word in ("torch", "2.9", "processes", "method", "nostalgia"):
        assert word in page.text or word.capitalize() in page.text


def test_nothing_is_fetched_and_nothing_runs(run: Path) -> None:
    page = read_page(run / "results" / "report.html")
    assert all(re.match(r"#[\w-]+$|data:(image/(png|svg\+xml);base64)?,", reference) for reference in page.references)
    assert not page.tags & {"script", "iframe", "object", "embed", "form"}
    assert not [name for name in page.attributes if name.startswith("on")]
    style = (run / "results" / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_text_wherever_they_come_from(tmp_path: Path) -> None:
    tasks = [EVIL, '"><img src=x onerror=alert(2)>', "$\\frac{a$ & {{ 7 * 7 }}"]
    run = write_run(tmp_path / "run", tasks=tasks, classes=[[EVIL, "$x$"], ["</table>"], ["&amp;"]], method=EVIL)
    (run / "config.yaml").write_text(yaml.safe_dump({"dataset": {EVIL: [EVIL]}, "experiment": {"name": EVIL}}))
    shutil.rmtree(run / "curvature")
    other = write_run(tmp_path / "b", tasks=tasks)
    for folders, out in (([run], None), ([run, other], tmp_path / "both.html")):
        source = write_report(folders, out).read_text()
        page = read_page(out or run / "results" / "report.html")
        assert not page.tags & {"script", "table-x"}
        assert "onerror" not in page.attributes
        assert EVIL not in source
        assert EVIL in page.text
    page = read_page(run / "results" / "report.html")
    assert page.tables["Classes"][1:] == [
        [tasks[0], f"{EVIL}, $x$", "2"],
        [tasks[1], "</table>", "1"],
        [tasks[2], "&amp;", "1"],
    ]
    assert page.pictures.keys() >= {"accuracy_matrix", "forgetting", "accuracy_vs_task"}


def test_secrets_and_the_environment_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hush-1")
    config = {"logger": {"api_key": "hush-2"}, "dataset": {"entries": {"x": [{"hf_token": "hush-3", "path": "/p"}]}}}
    source = write_report([begun(tmp_path / "run", config)]).read_text()
    assert "hush" not in source
    assert "(not shown)" in source
    assert "/p" in source


def recomputed(matrix: list[list[float | None]]) -> dict[str, float]:
    """The measures by their definitions, from the raw matrix and numpy alone."""
    a = np.array([[np.nan if v is None else v for v in row] for row in matrix])
    last, learned = a[-1], np.diag(a)
    best = np.array([np.max(a[u:-1, u]) for u in range(len(a) - 1)])
    return {
        "ACC": last.mean(),
        "BWT": (last[:-1] - learned[:-1]).mean(),
        "F": (best - last[:-1]).mean(),
        "LA": learned.mean(),
    }


def test_the_tables_are_those_recomputed_from_the_matrices(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    matrices: dict[str, list] = {"nostalgia": [], "finetune": []}
    folders = []
    for method, own in matrices.items():
        for seed in range(3):
            size = 4
            a = generator.uniform(size=(size, size))
            matrix = [[float(a[t, u]) if u <= t else None for u in range(size)] for t in range(size)]
            tasks = [f"task{t}" for t in range(size)]
            own.append(matrix)
            words = {"tasks": tasks, "classes": [["a"]] * size, "accuracy_matrix": matrix}
            unmeasured = {"before_accuracies": None, "baseline_accuracies": None}
            folders.append(write_run(tmp_path / f"{method}{seed}", method=method, seed=seed, **words, **unmeasured))
    page = read_page(write_report(folders[::-1], tmp_path / "report.html"))
    head, *rows = page.tables["Mean over seeds"]
    latex = [line.rstrip("\\ ").split(" & ") for line in page.codes["LaTeX (booktabs)"].splitlines() if " & " in line]
    markdown = [[c.strip() for c in line.split("|")[1:-1]] for line in page.codes["Markdown"].splitlines()]
    finals = page.tables["Accuracy on each task at the end"]
    for i, (method, own) in enumerate(matrices.items()):
        assert rows[i][:2] == [method, "0, 1, 2"]
        numbers = [recomputed(matrix) for matrix in own]
        for name in ("ACC", "BWT", "F", "LA"):
            values = np.array([n[name] for n in numbers])
            mean, std = f"{values.mean():.3f}", f"{values.std(ddof=1):.3f}"
            assert rows[i][head.index(name)] == f"{mean} ± {std}"
            assert latex[i + 1][latex[0].index(name)] == f"${mean} \\pm {std}$"
            assert markdown[i + 2][markdown[0].index(name)] == f"{mean} ± {std}"
        assert rows[i][head.index("FWT")] == "-"
        for u in range(4):
            values = np.array([matrix[-1][u] for matrix in own])
            assert finals[u + 1][i + 1] == f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
    runs = {tuple(row[1:3]): row for row in page.tables["Every run"][1:]}
    assert runs["finetune", "2"][3] == f"{recomputed(matrices['finetune'][2])['ACC']:.3f}"
    assert set(page.pictures) == {
        "average_accuracy", "forgetting", "accuracy_matrix_nostalgia", "accuracy_matrix_finetune",
        "forgetting_prediction",
    }  # fmt: skip


def test_a_run_under_way_is_reported_as_far_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_metrics(run, TASKS[:2])
    page = read_page(write_report([run]))
    assert "not finished" in page.text
    assert "2 finished tasks" in page.text
    assert page.headings == ["Accuracy", "Training", "Not shown"]
    assert "memory.csv is not there" in page.text


def test_a_run_that_has_only_begun_has_its_configuration(tmp_path: Path) -> None:
    page = read_page(write_report([begun(tmp_path / "run")]))
    assert page.headings == ["Configuration", "Not shown"]
    assert "no task finished" in page.text


def test_finetune_without_curvature_and_a_damaged_prediction(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    write_metrics(run)
    (run / "results").mkdir()
    (run / "results" / "forgetting_prediction.json").write_text('{"tasks": [{"task": "x"}], "rows": [{"task": "x"}]}')
    page = read_page(write_report([run]))
    assert "Curvature" not in page.headings
    assert "Forgetting, predicted and measured" not in page.headings
    assert "forgetting_prediction.json: rows must be a list" in page.text
    assert {"accuracy_matrix", "train_loss"} <= set(page.pictures)


def test_many_rows_are_those_after_the_last_task(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    write_forgetting(run, [f"task{t}" for t in range(1, 13)])
    rows = read_page(write_report([run])).tables["Increase of the loss of finished tasks"][1:]
    assert [row[1] for row in rows] == ["task12"] * 11


def test_unfinished_runs_and_doubts_are_named(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1)
    (second / "config.yaml").write_text("method: {name: nostalgia}\nnostalgia: {top_k: 8}\n")
    (first / "config.yaml").write_text("method: {name: nostalgia}\nnostalgia: {top_k: 32}\n")
    third = begun(tmp_path / "c")
    page = read_page(write_report([first, second, third, first], tmp_path / "out" / "page.html"))
    assert f"{third}: no results yet, 0 of its tasks evaluated" in page.text
    assert "nostalgia: its runs differ in nostalgia.top_k (32, 8)" in page.text
    assert page.tables["Mean over seeds"][1][1] == "0, 1"
    assert page.tables[""] == [
        ["key", "nostalgia, seed 0", "nostalgia, seed 1", "c"],
        ["nostalgia.top_k", "32", "8", "-"],
    ]
    same = by_method(read_finished([first, write_run(tmp_path / "d", seed=2)]))
    assert doubts(same) != []  # one has a top_k, the other's configuration does not say
    only = read_page(write_report([third, second], tmp_path / "two.html"))
    assert only.tables["Mean over seeds"][1][1] == "1"


def test_unequal_seeds_are_said(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a"), write_run(tmp_path / "b", method="finetune", seed=3)
    assert doubts(by_method(read_finished([one, two]))) == [
        "the methods ran with different seeds (nostalgia 0; finetune 3): each mean is over its own"
    ]
    assert doubts(by_method(read_finished([one, write_run(tmp_path / "c", method="finetune")]))) == []


def test_different_tasks_are_said_and_not_drawn_together(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", method="finetune", tasks=["x", "y", "z"])]
    page = read_page(write_report(runs, tmp_path / "page.html"))
    assert "the runs have different tasks" in page.text
    assert "average_accuracy" not in page.pictures
    assert "Accuracy on each task at the end" not in page.tables


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["nowhere"], 3, "nowhere: no such run folder"),
        (["empty"], 3, "empty: nothing of a run in it"),
        (["run/results"], 3, "it is the folder above"),
        (["run", "--out", "run/config.yaml/report.html"], 2, "cannot be written"),
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
    begun(tmp_path / "run")
    (tmp_path / "run" / "results").mkdir()
    assert report.main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert line in error
    assert error.count("\n") == 1


def test_the_command_says_where_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(begun(tmp_path / name)) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert report.main(runs) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert (tmp_path / "report.html").exists()
    assert report.main([runs[0], "--out", "one.html"]) == 0
    assert (tmp_path / "one.html").exists()
    with pytest.raises(NotFoundError):
        write_report([tmp_path / "none"])


def test_names_are_escaped_for_latex_and_markdown() -> None:
    assert escape_latex(r"a_b & 50% $x^2$ {~\}") == (
        r"a\_b \& 50\% \$x\textasciicircum{}2\$ \{\textasciitilde{}\textbackslash{}\}"
    )
    assert escape_markdown("a|b <b>\n*c*") == r"a\|b &lt;b> \*c\*"


def test_numbers_read_well() -> None:
    assert [significant(v) for v in (0.01234, 3511.4, -2e-7, 0, 1e9, None, float("nan"))] == [
        "0.0123", "3,511", "-2e-07", "0", "1e+09", "-", "-",
    ]  # fmt: skip


def test_configurations_are_flat_exact_and_without_secrets() -> None:
    config = {"a": {"b": 0.1, "c": {}, "tokens": 5, "token": "t"}, "d": [1, None, {"password": "p"}], "e": 1 / 3}
    assert dict(flat(config)) == {
        "a.b": "0.1", "a.c": "{}", "a.tokens": "(not shown)", "a.token": "(not shown)",
        "d": "[1, null, {password: (not shown)}]", "e": "0.3333333333333333",
    }  # fmt: skip
    assert text_of(30.0) == "30"
    repeats = [{"experiment": {"seed": s, "output_dir": str(s)}, "x": 1} for s in (0, 1)]
    assert differences(repeats) == {}
    assert differences([*repeats, {"x": 2}, {}]) == {"x": ["1", "1", "2", "-"]}


def test_reports_are_reproducible(run: Path, tmp_path: Path) -> None:
    again = write_report([run], tmp_path / "again.html")
    assert again.read_bytes() == (run / "results" / "report.html").read_bytes()


OWN = '''
from matplotlib.figure import Figure

NUMBER = 3

def accuracies(run):
    """Accuracies, in a figure of one's own."""
    figure = Figure()
    figure.subplots().plot([row[0] for row in run.matrix])
    return figure

def nothing(run):
    raise ValueError("nothing of mine to draw")

def broken(run):
    return run.no_such_thing

def text(run):
    return "no figure"

def forgetting(run):
    return Figure()
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of the user's."""
    (tmp_path / "own_figures_here.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_figures_here"
    sys.modules.pop("own_figures_here", None)


def test_figures_of_the_users_own_have_a_section(run: Path, tmp_path: Path, own: str) -> None:
    words = [f"--figure={own}:{name}" for name in ("accuracies", "nothing")]
    assert report.main([str(run), "--out", str(tmp_path / "page.html"), *words]) == 0
    page = read_page(tmp_path / "page.html")
    assert set(page.pictures) == FIGURES | {"accuracies"}
    assert page.pictures["accuracies"] == "accuracies. Accuracies, in a figure of one's own."
    assert "Your figures" in page.headings
    assert "figure nothing: nothing of mine to draw" in page.text
    copy = shutil.copytree(run, tmp_path / "copy")
    assert plot_all.main(["--results_dir", str(copy / "results"), *words]) == 0
    assert (copy / "results" / "figures" / "accuracies.png").is_file()


@pytest.mark.parametrize(
    ("name", "code", "line"),
    [
        ("own_figures_here", 2, "allowed is module:function"),
        ("no_such_module_here:f", 3, "there is no module no_such_module_here; run from its folder"),
        ("own_figures_here:missing", 3, "has no missing"),
        ("own_figures_here:NUMBER", 2, "3 is no function"),
        ("own_figures_here:forgetting", 2, "there is a figure forgetting already"),
        ("own_figures_here:text", 2, "it returned 'no figure'; allowed is a matplotlib Figure"),
        ("own_figures_here:broken", 2, "line 16: AttributeError"),
    ],
)
def test_wrong_figures_are_refused_in_one_line(
    run: Path, tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str], name: str, code: int, line: str
) -> None:
    assert report.main([str(run), "--out", str(tmp_path / "page.html"), "--figure", name]) == code
    error = capsys.readouterr().err
    assert error.startswith(f"error: --figure {name}: ")
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_a_figure_of_the_users_own_is_of_one_run(run: Path, tmp_path: Path, own: str, capsys) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    assert report.main([str(run), str(other), "--figure", f"{own}:accuracies"]) == 2
    assert "name one RUN_DIR, not 2" in capsys.readouterr().err
