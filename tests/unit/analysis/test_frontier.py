"""The comparison at equal learning accuracy, on results made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from bench import recompute
from nostalgia.analysis.figures_frontier import frontier_figure
from nostalgia.analysis.frontier import Cells, frontier, markdown, note, write_frontier
from nostalgia.logging.results import RunResults, write_results


def results(method: str, seed: int, learned: float, kept: float, memory: int = 0) -> RunResults:
    """Two tasks learned to ``learned``, the first one ending at ``kept``."""
    matrix = [[learned, None], [kept, learned]]
    return RunResults.of(
        tasks=["a", "b"],
        classes=[["x"], ["y"]],
        accuracy_matrix=matrix,
        class_incremental_matrix=[[learned, None], [kept / 2, learned / 2]],
        method=method,
        seed=seed,
        world_size=1,
        seconds=10.0 + seed,
        memory_bytes=memory,
        overhead_seconds={"training": 1.0, "between_tasks": 2.0},
    )


def made() -> Cells:
    """Strength 1 forgets, 10 keeps at the same learning accuracy, 100 keeps all and learns less."""
    return {
        ("finetune", None): [results("finetune", s, 0.9 + 0.01 * s, 0.5) for s in (0, 1, 2)],
        ("ewc", 1.0): [results("ewc", s, 0.9 + 0.01 * s, 0.6, 8) for s in (0, 1, 2)],
        ("ewc", 10.0): [results("ewc", s, 0.898 + 0.01 * s, 0.8 + 0.001 * s, 8) for s in (0, 1, 2)],
        ("ewc", 100.0): [results("ewc", s, 0.85, 0.849, 8) for s in (0, 1, 2)],
        ("gpm", 0.9): [results("gpm", s, 0.7, 0.7) for s in (0, 1, 2)],
    }


def test_a_method_is_reported_at_the_best_strength_within_the_margin() -> None:
    rows = {row.point.method: row for row in frontier(made()).rows}
    assert (rows["ewc"].point.strength, rows["ewc"].reaches) == (10.0, True)
    assert rows["ewc"].point.mean["acc"] == pytest.approx((0.849 + 0.8545 + 0.86) / 3)
    assert rows["ewc"].point.mean["forgetting_left"] == pytest.approx(
        sum(0.898 + 0.009 * s - 0.8 for s in range(3)) / sum(0.4 + 0.01 * s for s in range(3))
    )
    assert (rows["gpm"].reaches, rows["finetune"].reaches) == (False, True)
    assert rows["ewc"].point.mean["bytes"] == 8
    assert rows["ewc"].point.error["learning_accuracy"] == pytest.approx(0.01 / 3**0.5)
    ours = [r.acc for r in made()["ewc", 10.0]]
    theirs = [r.acc for r in made()["finetune", None]]
    assert rows["ewc"].p_value == pytest.approx(ttest_rel(ours, theirs).pvalue)


def test_joint_training_has_no_learning_accuracy_to_reach() -> None:
    joint = [replace(results("joint", s, 0.9, 0.9), learning_accuracy=None) for s in (0, 1, 2)]
    found = frontier({**made(), ("joint", None): joint})
    (row,) = [row for row in found.rows if row.point.method == "joint"]
    assert row.reaches is None
    assert "| joint | - |" in markdown(found)


def test_strengths_are_chosen_on_the_selection_seeds_and_reported_on_the_others() -> None:
    cells = dict(made())
    cells["ewc", 1.0] = [*cells["ewc", 1.0][:2], results("ewc", 2, 0.92, 0.91)]  # best on seed 2 alone
    found = frontier(cells, select_seeds=[2])
    row = next(row for row in found.rows if row.point.method == "ewc")
    assert row.point.strength == 1.0
    assert row.point.seeds == [0, 1]
    assert row.point.mean["acc"] == pytest.approx((0.75 + 0.755) / 2)
    assert "chosen on seeds 2" in markdown(found)


def test_no_strength_is_chosen_on_the_reported_seeds_where_selection_runs_are_missing() -> None:
    """Of a sweep that is not finished: one strength's, all of a method's, or fine-tuning's."""
    cells = dict(made())
    cells["ewc", 10.0] = cells["ewc", 10.0][:2]
    found = frontier(cells, select_seeds=[2])
    row = next(row for row in found.rows if row.point.method == "ewc")
    assert row.point.strength == 1.0  # 10 is better on the reported seeds
    assert found.undecided == []
    for missing in ("ewc", "finetune"):
        short = {key: runs[:2] if key[0] == missing else runs for key, runs in made().items()}
        found = frontier(short, select_seeds=[2])
        assert found.undecided == ["ewc"], missing
        assert {row.point.method for row in found.rows} == {"finetune", "gpm"}
        assert note(found).startswith("Not chosen yet, for want of runs: the strength of ewc. ")
    rows = {row.point.method: row for row in found.rows}
    assert not rows["gpm"].reaches  # nothing is chosen there: held against the reported seeds


def test_files_and_figure_and_an_independent_recomputation(tmp_path: Path) -> None:
    for (method, strength), runs in made().items():
        for run in runs:
            place = tmp_path / method / (f"strength_{strength:g}" if strength is not None else "") / f"seed{run.seed}"
            write_results(place / "results", run)
    found = frontier(made())
    write_frontier(tmp_path, found)
    saved = json.loads((tmp_path / "frontier.json").read_text())
    assert len(saved["points"]) == 5
    assert (tmp_path / "frontier.csv").read_text().splitlines()[1].startswith("ewc,10.0,0 1 2,")
    assert "| ewc | 10 |" in (tmp_path / "frontier.md").read_text()
    assert "| gpm | 0.9 * |" in (tmp_path / "frontier.md").read_text()
    assert recompute.main([str(tmp_path)]) == 0
    saved["points"][1]["mean"]["acc"] += 1e-9
    (tmp_path / "frontier.json").write_text(json.dumps(saved))
    assert recompute.main([str(tmp_path)]) == 1
    frontier_figure(found).savefig(tmp_path / "x.png")


def test_strengths_are_compared_over_the_seeds_that_all_of_them_have() -> None:
    """Seed 1 is easier than seed 0; strength 10 is better on seed 0, and has no other yet."""
    found = frontier(
        {
            ("finetune", None): [results("finetune", seed, 0.9, 0.5 + 0.2 * seed) for seed in (0, 1)],
            ("ewc", 1.0): [results("ewc", seed, 0.9, 0.6 + 0.2 * seed) for seed in (0, 1)],
            ("ewc", 10.0): [results("ewc", 0, 0.9, 0.65)],
        }
    )
    (row,) = (row for row in found.rows if row.point.method == "ewc")
    assert row.point.strength == 10.0
    assert row.point.seeds == [0]
    assert note(found).startswith("Not all rows are over the same seeds: ")
    assert "ewc over 0" in note(found)


def test_nothing_is_left_of_no_forgetting_and_equal_gains_are_no_sample() -> None:
    found = frontier(
        {
            ("finetune", None): [results("finetune", seed, 0.9, 0.91 + 0.1 * seed / 3) for seed in (0, 1)],
            ("ewc", 1.0): [results("ewc", seed, 0.9, 0.91 + 0.1 * seed / 3 + 3 / 359) for seed in (0, 1)],
        }
    )
    assert all(row.point.mean["forgetting_left"] is None for row in found.rows)
    assert all(row.p_value is None for row in found.rows)
