"""Figures hold the numbers they are given, for one task and for many, one seed and several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from nostalgia.analysis import figure_style, figures, figures_curvature, figures_theory, figures_training
from nostalgia.analysis.figures_curvature import Spectrum
from tests.unit.analysis.folders import MATRIX, TASKS


def triangle(count: int) -> list[list[float | None]]:
    return [[0.9 - 0.02 * (t - u) if u <= t else None for u in range(count)] for t in range(count)]


def lines(figure: Figure, label: str, panel: int = 0) -> tuple[list[float], list[float]]:
    """Data of the line with a label."""
    handles, labels = figure.axes[panel].get_legend_handles_labels()
    handle = handles[labels.index(label)]
    line = handle.lines[0] if hasattr(handle, "lines") else handle
    return list(line.get_xdata()), list(line.get_ydata())


def test_accuracy_lines_start_where_a_task_is_learned() -> None:
    figure = figures.accuracy_vs_task(TASKS, [MATRIX])
    assert lines(figure, "task1_digits") == ([1, 2, 3], [0.9, 0.95, 0.6])
    assert lines(figure, "task2_digits") == ([2, 3], [0.8, 0.7])


def test_forgetting_of_each_task_and_their_mean() -> None:
    figure = figures.forgetting(TASKS, {"nostalgia": [MATRIX]})
    x, y = lines(figure, "mean")
    assert x == [2, 3]
    assert y == pytest.approx([-0.05, 0.225])
    assert lines(figure, "task1_digits")[1] == pytest.approx([-0.05, 0.35])
    with pytest.raises(ValueError, match="from two tasks on"):
        figures.forgetting(["a"], {"nostalgia": [[[0.9]]]})


def test_several_seeds_are_mean_and_standard_deviation() -> None:
    lower = [[None if v is None else v - 0.2 for v in row] for row in MATRIX]
    figure = figures.average_accuracy(TASKS, {"nostalgia": [MATRIX, lower], "finetune": [lower]})
    handles, labels = figure.axes[0].get_legend_handles_labels()
    assert labels == ["nostalgia (n = 2)", "finetune"]
    assert lines(figure, "nostalgia (n = 2)")[1][0] == pytest.approx(0.8)
    (_, low), (_, high) = handles[0].lines[2][0].get_segments()[0]
    assert (low, high) == pytest.approx((0.8 - np.std([0.9, 0.7], ddof=1), 0.8 + np.std([0.9, 0.7], ddof=1)))
    assert handles[1].lines[2] == ()


def test_the_matrix_prints_every_number_in_a_colour_that_reads() -> None:
    figure = figures.accuracy_matrix(TASKS, [[[0.05, None, None], [0.95, 0.8, None], [0.6, 0.7, 0.85]]])
    cells = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert set(cells) == {"0.050", "0.950", "0.800", "0.600", "0.700", "0.850"}
    assert (cells["0.050"], cells["0.950"]) == ("white", "black")


@pytest.mark.parametrize("count", [1, 2, 6, 20])
def test_one_task_and_twenty(count: int, tmp_path: Path) -> None:
    names = [f"task{t}_a_data_set_with_a_long_name" for t in range(1, count + 1)]
    made = [
        figures.accuracy_vs_task(names, [triangle(count)]),
        figures.average_accuracy(names, {"nostalgia": [triangle(count)]}),
        figures.accuracy_matrix(names, [triangle(count)]),
        figures_curvature.spectrum([Spectrum(name, [3.0, 1.0, 0.1], [0.1, 0.1, 0.2]) for name in names]),
    ]
    for i, figure in enumerate(made):
        path = figure_style.save(figure, tmp_path / f"{i}.png")
        image = imread(path)[:, :, :3]
        assert image.shape[0] <= 2000
        assert image.shape[1] <= 2000
        # Nothing is cut off: the border stays empty.
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert border.min() > 0.99


def test_joint_training_has_points_but_no_history() -> None:
    matrix = [[None, None], [0.9, 0.8]]
    assert lines(figures.accuracy_vs_task(["a", "b"], [matrix]), "1 a") == ([2], [0.9])
    with pytest.raises(ValueError, match="before and after"):
        figures.forgetting(["a", "b"], {"joint": [matrix]})


def test_spectrum_shows_residuals_the_cut_and_what_did_not_converge() -> None:
    task = Spectrum("task1", [4.0, 2.0, -1.0], [0.1, 3.0, 0.1], [True, False, True])
    figure = figures_curvature.spectrum([task])
    axes = figure.axes[0]
    assert lines(figure, "task1")[1] == [4.0, 2.0]
    assert lines(figure, "not converged")[1] == []
    assert any(text.get_text() == "rank cut, k = 3" for text in axes.texts)
    assert "1 not positive, not shown" in axes.get_title(loc="left")
    # A residual larger than its eigenvalue must not reach below zero on a logarithmic axis.
    assert min(point for bar in axes.collections for s in bar.get_segments() for _, point in s) > 0


def test_density_gets_a_panel_of_its_own() -> None:
    task = Spectrum("task1", [4.0], density=([0.0, 1.0, 2.0], [0.5, 0.4, 0.1]))
    assert len(figures_curvature.spectrum([task]).axes) == 2


def test_overlap_is_the_mean_squared_cosine() -> None:
    angles = {(0, 1): [0.0, np.pi / 2], (0, 2): [np.pi / 4] * 2, (1, 2): [np.pi / 2] * 2}
    figure = figures_curvature.subspace_overlap(TASKS, angles)
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["0.000", "0.500", "0.500"]
    assert lines(figure, "tasks 1 and 2", panel=1)[1] == pytest.approx([0.0, 90.0])
    with pytest.raises(ValueError, match="two tasks"):
        figures_curvature.subspace_overlap(["a"], {})


def test_curvature_share_is_one_of_the_trace_where_it_is_known() -> None:
    task = Spectrum("task1", [3.0, 1.0])
    assert lines(figures_curvature.curvature_share([task], [8.0]), "task1")[1] == pytest.approx([3 / 8, 1 / 2])
    assert lines(figures_curvature.curvature_share([task], [None]), "task1")[1] == pytest.approx([3 / 4, 1.0])


def test_the_loss_of_a_new_task_is_no_continuation() -> None:
    rows = [
        {
            "step": float(s),
            "task": f"task{1 + s // 10}",
            "split": "train",
            "loss": 1.0 + s // 10,
            "epoch": 1.0,
        }
        for s in range(20)
    ]
    axes = figures_training.train_loss(rows).axes[0]
    drawn = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 10]
    assert drawn == [[1.0] * 10] * 2 + [[2.0] * 10] * 2
    with pytest.raises(ValueError, match="no training loss"):
        figures_training.train_loss([])


def test_memory_of_each_rank_in_gib() -> None:
    rows = [
        {"time": 10.0 + t, "step": 1.0, "rank": float(r), "gpu_mem_mb": 1024.0 * r, "cpu_mem_mb": 512.0}
        for t in range(2)
        for r in range(2)
    ]
    figure = figures_training.memory(rows)
    assert lines(figure, "rank 1", panel=0) == ([0.0, 1.0], [0.5, 0.5])
    assert lines(figure, "rank 1", panel=1)[1] == [1.0, 1.0]
    with pytest.raises(ValueError, match="no measurement"):
        figures_training.memory([])


def test_long_names_keep_both_ends() -> None:
    assert figure_style.short("task3_stanford_cars_extended", 18) == "task3_sta…extended"
    assert figure_style.short("task3_cars") == "task3_cars"


def test_colours_are_apart_in_grey() -> None:
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b, _ in figure_style.sequential(6)]
    assert min(np.diff(grey)) > 0.07


def prediction(predicted: float, measured: float, bound: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "bound": bound}


def test_measured_stands_over_predicted_and_over_the_bound() -> None:
    rows = {"task1": [prediction(0.1, 0.2, 0.5), prediction(-0.1, 0.3, 0.0)], "task2": [prediction(0.4, 0.1, 0.05)]}
    figure = figures_theory.forgetting_prediction(rows)
    assert lines(figure, "task1") == ([0.1, -0.1], [0.2, 0.3])
    assert lines(figure, "task1", panel=1) == ([0.5], [0.2])  # a bound of zero has no place on a logarithmic axis
    assert lines(figure, "task2", panel=1) == ([0.05], [0.1])
    left, right = figure.axes[:2]
    assert left.get_xlim() == left.get_ylim()
    assert right.get_xscale() == "log"
    assert len(figures_theory.forgetting_prediction({"a": [prediction(0.0, 0.0, 0.0)]}).axes) == 2
    with pytest.raises(ValueError, match="no later task was measured"):
        figures_theory.forgetting_prediction({"task1": []})


def test_importance_sums_over_what_is_named_together() -> None:
    names = ["model.0.a.weight", "model.0.a.bias", "model.1.weight"]
    task = figures_theory.Shares("task1", names, [60, 30, 10], [0.5, 0.3, 0.2], [0.6, 0.1, 0.3])
    figure = figures_theory.importance([task])
    assert lines(figure, "task1")[0] == [0.5, 0.3, 0.2]
    assert lines(figure, "if spread evenly")[0] == [0.6, 0.3, 0.1]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.6, 0.1, 0.3]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["0.a.weight", "0.a.bias", "1.weight"]
    assert figures_theory.group_parameters(names, rows=2) == {"0.a": [0, 1], "1.weight": [2]}
    many = [f"layers.{i}.{part}.weight" for i in range(30) for part in "ab"]
    groups = figures_theory.group_parameters(many)
    assert list(groups) == [str(i) for i in range(30)]
    assert groups["7"] == [14, 15]
    assert figures_theory.group_parameters(["only"]) == {"only": [0]}
    with pytest.raises(ValueError, match="no shares of the parameters"):
        figures_theory.importance([])


def test_dollars_in_names_are_no_mathematics(tmp_path: Path) -> None:
    name = "$\\frac{a$"
    figure = figures.average_accuracy([name, "b"], {"one $x": [triangle(2)], "$y$": [triangle(2)]})
    figure_style.save(figure, tmp_path / "a.png")
    assert figure.axes[0].get_ylabel() == "mean accuracy (fraction)"
    assert b"<svg" in figure_style.svg(figures.accuracy_matrix([name, "$b$"], [triangle(2)], "$m$"))
