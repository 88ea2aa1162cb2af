"""What a run prints: complete, within 80 columns, readable without colour."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from nostalgia.logging import console
from nostalgia.logging.console import RunInfo, TaskInfo, TaskOutcome
from tests.unit.analysis.folders import MATRIX, TASKS, results

LONG = "task3_[a]_data_set_with_a_name_that_does_not_fit"


def run_info(**changes: object) -> RunInfo:
    words = {
        "method": "nostalgia",
        "seed": 3,
        "tasks": [
            TaskInfo("task1_digits", 5, 721, 180, "embedded (scikit-learn)"),
            TaskInfo(LONG, 1000, 1_281_167, 50_000, "/data/[x]/images"),
        ],
        "model": "google/vit-base-patch16-224",
        "total_parameters": 85_798_656,
        "trainable_parameters": 589_824,
        "scope_parameters": 442_368,
        "scope": "lora-only",
        "devices": "8 x NVIDIA H100",
        "strategy": "ddp",
        "precision": "bf16",
        "per_device_batch_size": 32,
        "accumulation_steps": 2,
        "global_batch_size": 512,
        "epochs": [50, 50],
        "run_dir": Path("/scratch/someone/with/a/long/path/to/runs/main/2025-01-01_12-00-00-and-more-of-it"),
        "suite": "main",
        "memory_bytes": 128 * 442_368 * 4,
        "memory": "at most 128 directions",
    }
    return RunInfo(**{**words, **changes})  # type: ignore[arg-type]


def printed(width: int = 80) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, color_system=None), stream


def fits(text: str, width: int = 80) -> bool:
    return all(len(line) <= width for line in text.splitlines())


def test_start_panel_says_everything_within_80_columns() -> None:
    text = console.plain(console.start_panel(run_info()))
    assert fits(text)
    for part in (
        "nostalgia: main",
        "nostalgia, seed 3",
        "85.8M parameters",
        "590k trained, 442k in the method's scope (lora-only)",
        "8 x NVIDIA H100, ddp, precision bf16",
        "512 global: 32 per device x 2 accumulated",
        "at most 128 directions: 216 MiB over all ranks",
        "50 a task",
        "1,281,167",
        "task3_[a]_data_set_with_a",
        "/data/[x]/images",
    ):
        assert part in text


def test_start_panel_says_that_adapters_begin_anew() -> None:
    words = "adapters are merged and begin anew with each task"
    assert words in console.plain(console.start_panel(run_info(merges_adapters=True)))
    assert words not in console.plain(console.start_panel(run_info()))


def test_start_panel_of_a_method_that_remembers_nothing() -> None:
    text = console.plain(console.start_panel(run_info(memory_bytes=0, suite=None, epochs=[1, 2])))
    assert "memory" not in text
    assert "epochs   1, 2" in text


def test_the_end_of_a_task() -> None:
    outcome = TaskOutcome(
        index=2,
        total=3,
        tasks=TASKS,
        matrix=MATRIX[:2],
        seconds=75.0,
        eigenvalues=[45.2, 12.0, 0.0345],
        converged=2,
        products=99,
        leak=2.1e-7,
        memory_columns=64,
    )
    text = " ".join(console.plain(console.task_row(outcome)).split())
    assert fits(console.plain(console.task_row(outcome)))
    for part in (
        "task 2/3 task2_digits: 1 min 15 s",
        "task1_digits 0.950, task2_digits 0.800",
        "average 0.875, forgetting -0.050",
        "top eigenvalue 45.2, number 3: 0.0345, 2 of 3 converged",
        "64 directions",
        "2.1e-07",
    ):
        assert part in text


def test_the_end_of_the_first_task_of_a_plain_method() -> None:
    text = console.plain(console.task_row(TaskOutcome(index=1, total=3, tasks=TASKS, matrix=[[0.9]], seconds=1.0)))
    assert "average 0.900, forgetting -" in text
    assert "eigenvalue" not in text


def test_final_tables_hold_every_number_and_path() -> None:
    shown, stream = printed()
    console.print_final(shown, results(before_accuracies=None), {"results": Path("runs/[x]/results.json")})
    lines = stream.getvalue().splitlines()
    assert any(line.split() == ["3", "task3_mnist", "0.600", "0.700", "0.850"] for line in lines)
    assert any(line.startswith("backward transfer  -0.200") for line in lines)
    assert any(line.startswith("forward transfer        -") for line in lines)
    assert "results  runs/[x]/results.json" in lines
    assert fits(stream.getvalue())


@pytest.mark.parametrize("width", [60, 80, 200])
def test_many_tasks_go_to_further_tables(width: int) -> None:
    names = [f"task{t}_cifar100" for t in range(1, 21)]
    matrix = [[0.5 + t / 100 if u <= t else None for u in range(20)] for t in range(20)]
    tables = [console.plain(table, width) for table in console.matrix_tables(names, matrix, width)]
    assert all(fits(table, width) for table in tables)
    assert sum(table.count("0.") for table in tables) == 210
    assert "…" not in "".join(tables)


def test_joint_training_shows_dashes_for_rows_it_does_not_have() -> None:
    matrix = [[None, None], [0.9, 0.8]]
    (table,) = console.matrix_tables(["a", "b"], matrix)
    assert [line.split() for line in console.plain(table).splitlines()[-2:]] == [
        ["1", "a", "-"],
        ["2", "b", "0.900", "0.800"],
    ]


def test_config_is_printed_or_folded() -> None:
    shown, stream = printed()
    config = {"train": {"lr": 1e-3, "note": "[red]"}}
    console.print_config(shown, config, path=Path("runs/config.yaml"))
    assert "lr: 0.001" in stream.getvalue()
    assert "[red]" in stream.getvalue()
    shown, stream = printed()
    console.print_config(shown, config, path=Path("runs/config.yaml"), quiet=True)
    assert stream.getvalue() == "config (runs/config.yaml)\n"


@pytest.mark.parametrize(("value", "text"), [(999, "999"), (454_321, "454k"), (85_798_656, "85.8M"), (2 * 10**9, "2G")])
def test_counts(value: int, text: str) -> None:
    assert console.count(value) == text
