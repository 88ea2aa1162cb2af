"""The estimate of a full run's cost, against counts made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from nostalgia.analysis.cost import Measured, TaskLoad, Workload, cost_panel, estimate
from nostalgia.analysis.run_folder import RunFolder, TaskCurvature
from nostalgia.logging.console import plain


def workload(**changes: object) -> Workload:
    values: dict = {
        "tasks": [TaskLoad(100, 20, 3), TaskLoad(65, 10, 2)],
        "joint": False,
        "global_batch_size": 32,
        "head_warmup_epochs": 0,
        "top_k": 8,
        "num_samples": 80,
        "trained_parameters": 1000,
        "merged_weights": 0,
        "optimizer_states": 2,
        "memory_bytes": 57_600,
        "memory": "at most 16 directions",
        "devices": "2 x cpu",
    }
    return Workload(**{**values, **changes})


def test_counts_and_times() -> None:
    cost = estimate(workload(), Measured(0.3, 0.01))
    assert cost.steps == 4 * 3 + 3 * 2  # 100 and 65 images in batches of 32
    assert cost.warmup_steps == 0
    assert cost.products == 34
    assert cost.training_seconds == pytest.approx((300 + 130) * 0.3)
    # Validation after each epoch, and rows of one and of two tasks.
    assert cost.evaluation_seconds == pytest.approx((60 + 20 + 20 + 30) * 0.1)
    assert cost.curvature_seconds == pytest.approx((80 + 65) * 34 * 0.01)
    assert cost.checkpoint_bytes == 12_000


def test_an_epoch_that_is_cut_short_counts_what_it_takes() -> None:
    cost = estimate(workload(max_steps_per_epoch=2, head_warmup_epochs=1), Measured(0.3, None))
    assert (cost.steps, cost.warmup_steps) == (2 * 3 + 2 * 2, 2 * 1 + 2 * 2)
    assert cost.training_seconds == pytest.approx((64 * 3 + 64 * 2) * 0.3)
    joint = estimate(workload(max_steps_per_epoch=2, joint=True, top_k=0), Measured(0.3, None))
    assert (joint.steps, joint.training_seconds) == (6, pytest.approx(64 * 3 * 0.3))


def test_heads_are_fitted_twice_from_the_second_task_on() -> None:
    cost = estimate(workload(head_warmup_epochs=2), Measured(0.3, None))
    assert cost.warmup_steps == 4 * 2 + 3 * 4
    images = 100 * 2 + 65 * 4 + (60 + 20 + 20 + 30) + (20 + 2 * 10)
    assert cost.evaluation_seconds == pytest.approx(images * 0.1)
    assert cost.curvature_seconds is None
    assert cost.seconds == pytest.approx(cost.training_seconds + cost.evaluation_seconds)


def test_joint_trains_all_tasks_in_one_batch_stream() -> None:
    cost = estimate(workload(joint=True, top_k=0, memory_bytes=0), Measured(0.3, None))
    assert (cost.steps, cost.products) == (6 * 3, 0)  # 165 images in batches of 32, the first task's epochs
    assert cost.evaluation_seconds == pytest.approx(30 * 0.1)


def test_measured_leaves_out_each_task_s_first_step() -> None:
    run = RunFolder(Path("x"))
    rows = [("a", 1.0), ("a", 10.0), ("a", 10.0), ("b", 1.0), ("b", 20.0), ("b", 10.0)]
    run.metrics = [{"split": "train", "task": task, "images_per_s": rate} for task, rate in rows]
    run.curvature = [TaskCurvature(1, "a", [1.0], [], [True], [], {}, {"seconds": 4.0, "products": 8})]
    assert Measured.of(run, 50) == Measured(0.1, 0.01)
    assert Measured.of(RunFolder(Path("x")), 50) == Measured(None, None)


def test_the_panel_fits_and_says_what_was_not_measured() -> None:
    work = workload()
    text = plain(cost_panel(work, estimate(work, Measured(0.3, 0.01))))
    assert "18 of 32 images" in text
    assert "at most about 49 s: 2 x about 34 products" in text
    assert "at most 16 directions: 56.2 KiB over all ranks" in text
    text = plain(cost_panel(work, estimate(work, Measured(None, None))))
    assert text.count("not measured") == 4
    assert max(map(len, text.splitlines())) <= 80
