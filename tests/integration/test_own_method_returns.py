"""What a hook of the user's own returns and cannot: one line, and the right exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nostalgia.methods import Method
from tests.ranks import run_train

WORDS = [
    "--suite", "demo", "--quiet", "experiment.tasks=[{dataset: digits, classes: [0, 1]}]", "train.epochs=1",
    "train.max_steps_per_epoch=2", "train.head_warmup_epochs=0", "train.accelerator=cpu", "logger.report=false",
]  # fmt: skip


class Number(Method):
    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        return super().loss(model, batch).loss


class NotANumber(Method):
    def metrics(self):  # type: ignore[no-untyped-def]
        return {"gap": float("nan")}


class Frozen(Method):
    def begin_task(self, task):  # type: ignore[no-untyped-def]
        next(iter(task.parameters.values())).requires_grad_(False)


class NoPlan(Method):
    def memory_plan(self, space, num_tasks):  # type: ignore[no-untyped-def]
        return None


class Leaves(Method):
    def end_task(self, task):  # type: ignore[no-untyped-def]
        sys.exit(0)


def test_one_that_leaves_is_a_run_that_failed(tmp_path: Path) -> None:
    done = run_train([*WORDS, f"method={__name__}:Leaves", f"experiment.output_dir={tmp_path}"])
    assert done.codes == [4], done.stderr
    assert "error: exit was called at " in done.stderr
    assert "SystemExit: 0" in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Number", "loss returned tensor("),
        pytest.param("NotANumber", "metrics() gave gap=nan; allowed are finite numbers", marks=pytest.mark.exhaustive),
        pytest.param("Frozen", "begin_task left requires_grad of model.", marks=pytest.mark.exhaustive),
        pytest.param("NoPlan", "memory_plan returned None; allowed is a MemoryPlan", marks=pytest.mark.exhaustive),
    ],
)
def test_it_is_refused_in_one_line(tmp_path: Path, name: str, message: str) -> None:
    done = run_train([*WORDS, f"method={__name__}:{name}", f"experiment.output_dir={tmp_path}"])
    assert done.codes == [2], done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"method={name}: {message}" in line
    assert "Traceback" not in done.stderr
