"""Small run folders, as a run leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nostalgia.logging.csv_log import MEMORY_COLUMNS, METRICS_COLUMNS, CsvLog
from nostalgia.logging.results import RunResults, write_results

TASKS = ["task1_digits", "task2_digits", "task3_mnist"]
MATRIX = [[0.9, None, None], [0.95, 0.8, None], [0.6, 0.7, 0.85]]


def results(seed: int = 0, method: str = "nostalgia", shift: float = 0.0, **changes: Any) -> RunResults:
    """Results of three tasks; ``shift`` is taken from every accuracy."""
    matrix = [[None if value is None else value - shift for value in row] for row in MATRIX]
    words: dict[str, Any] = {
        "tasks": TASKS,
        "classes": [["a", "b"], ["c"], ["d"]],
        "accuracy_matrix": matrix,
        "method": method,
        "seed": seed,
        "world_size": 2,
        "seconds": 60.0 + seed,
        "versions": {"torch": "2.9"},
        "before_accuracies": [None, 0.5, 0.6],
        "baseline_accuracies": [None, 0.4, 0.5],
    }
    return RunResults.of(**{**words, **changes})


def write_metrics(folder: Path, tasks: list[str] = TASKS) -> None:
    """Two logged steps, a validation and the evaluations of each task."""
    log = CsvLog(folder / "metrics.csv", METRICS_COLUMNS)
    for t, task in enumerate(tasks):
        for step in (10 * t + 5, 10 * t + 10):
            row = {
                "step": step,
                "task": task,
                "epoch": 1,
                "split": "train",
                "loss": 1.0 / step,
                "accuracy": 0.5,
            }
            log.write({**row, "images_per_s": 100.0, "projected_fraction": 0.25 if t else None})
        leak = 1e-7 if t else None
        validation = {"step": step, "task": task, "epoch": 1, "split": "val"}
        log.write({**validation, "loss": 0.5, "accuracy": 0.9, "leak": leak})
        for u in range(t + 1):
            log.write({"step": step, "task": tasks[u], "split": "eval", "accuracy": MATRIX[t][u]})
    log.close()


def write_curvature(folder: Path, tasks: list[str] = TASKS) -> None:
    for t, task in enumerate(tasks):
        content = {
            "task": task,
            "eigenvalues": [4.0, 2.0, 0.5],
            "residuals": [0.01, 0.01, 0.2],
            "converged": [True, True, False],
            "products": 20,
            "seconds": 1.5,
            "tol": 0.01,
            "memory_eigenvalues": [4.0, 2.0],
            "principal_angles": {tasks[u]: [0.1, 0.7, 1.5] for u in range(t)},
            "trace": 8.0,
            "parameters": ["blocks.0.weight", "blocks.0.bias", "norm.weight"],
            "parameter_sizes": [60, 30, 10],
            "importance": [0.5, 0.3, 0.2],
            "memory_importance": [0.6, 0.3, 0.1],
        }
        (folder / "curvature").mkdir(exist_ok=True)
        (folder / "curvature" / f"task{t + 1}.json").write_text(json.dumps(content))


def write_forgetting(folder: Path, tasks: list[str] = TASKS) -> None:
    rows = [
        {
            "task": tasks[u],
            "after": tasks[t],
            "measured": 0.02 * t,
            "predicted": 0.015 * t,
            "linear": 0.01 * t,
            "inside": 1e-9,
            "outside": 0.005 * t,
            "bound": 0.4 * t,
            "displacement": 1.25,
        }
        for t in range(len(tasks))
        for u in range(t)
    ]
    finished = [{"task": task, "loss": 0.1, "trace": 8.0, "trace_error": 0.1, "eigenpairs": 3} for task in tasks]
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "forgetting_prediction.json").write_text(json.dumps({"tasks": finished, "rows": rows}))


def write_run(folder: Path, **changes: Any) -> Path:
    """A finished run folder."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"method:\n  name: {changes.get('method', 'nostalgia')}\n")
    write_metrics(folder)
    write_curvature(folder)
    write_forgetting(folder)
    memory = CsvLog(folder / "memory.csv", MEMORY_COLUMNS)
    for step in (5, 10):
        for rank in (0, 1):
            memory.write(
                {
                    "time": 1e9 + step,
                    "step": step,
                    "rank": rank,
                    "gpu_mem_mb": 0.0,
                    "cpu_mem_mb": 500.0 + step,
                }
            )
    memory.close()
    write_results(folder / "results", results(**changes))
    return folder
