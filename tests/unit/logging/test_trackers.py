"""What a run logs arrives in CSV, TensorBoard and W&B; a tracker that fails does not end the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker

from nostalgia.logging.csv_log import MEMORY_COLUMNS, METRICS_COLUMNS, read_log
from nostalgia.logging.run_log import RunLog
from nostalgia.logging.trackers import Forgiving
from nostalgia.utils.nested import flatten
from tests.unit.analysis.folders import results


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def log_a_run(log: RunLog, first_step: int = 1) -> None:
    for step in range(first_step, 5):
        log.train_step(
            step=step, task="task1_digits", epoch=1, loss=1.0 / step, accuracy=0.5, lr=1e-3, images_per_s=9.0
        )
    log.validation(step=4, task="task1_digits", epoch=1, loss=0.4, accuracy=0.9, metrics={"leak": 2e-7})
    log.evaluation(step=4, tasks=["task1_digits"], accuracies=[0.9], losses=[0.4])
    log.curvature("task1_digits", [3.0, 1.0], residuals=[0.01, 0.02], products=12, seconds=0.5)
    log.memory()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar TensorBoard would show, by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_csv_and_tensorboard_under_one_naming_scheme(tmp_path: Path, accelerator: Accelerator) -> None:
    log = RunLog(tmp_path, accelerator, config={"train": {"lr": 1e-3, "betas": [0.9, 0.999]}})
    log_a_run(log)
    log.finish(results())
    rows = read_log(tmp_path / "metrics.csv")
    assert list(rows[0]) == list(METRICS_COLUMNS)
    assert [row["split"] for row in rows] == ["train"] * 4 + ["val", "eval"]
    assert rows[4]["leak"] == 2e-7
    memory = read_log(tmp_path / "memory.csv")
    assert list(memory[0]) == list(MEMORY_COLUMNS)
    assert (memory[0]["rank"], memory[0]["step"], memory[0]["gpu_mem_mb"]) == (0, 4, 0)
    assert memory[0]["cpu_mem_mb"] > 10
    shown = scalars(tmp_path / "tensorboard")
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]
    assert shown["val/accuracy/task1_digits"][0] == (4, pytest.approx(0.9))
    assert shown["curvature/task1_digits/eigenvalue_2"] == [(4, 1.0)]
    assert shown["method/leak"][0] == (4, pytest.approx(2e-7))
    assert shown["result/acc"][0][1] == pytest.approx(results().acc)


def test_a_resumed_run_goes_on_after_its_checkpoint(tmp_path: Path, accelerator: Accelerator) -> None:
    first = RunLog(tmp_path, accelerator)
    for step in (1, 2):
        first.train_step(step=step, task="task1_digits", epoch=1, loss=1.0)
    position = first.position()
    log_a_run(first, first_step=3)  # lost: the run is taken up from before it
    first.finish()
    resumed = RunLog(tmp_path, accelerator, resume=position)
    assert [row["step"] for row in read_log(tmp_path / "metrics.csv")] == [1, 2]
    assert read_log(tmp_path / "memory.csv") == []
    log_a_run(resumed, first_step=3)
    resumed.finish()
    rows = read_log(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]
    shown = scalars(tmp_path / "tensorboard")
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4]
    assert len(shown["curvature/task1_digits/eigenvalue_2"]) == 1


def test_tensorboard_can_be_left_out(tmp_path: Path, accelerator: Accelerator) -> None:
    RunLog(tmp_path, accelerator, tensorboard=False).finish()
    assert not (tmp_path / "tensorboard").exists()


def test_a_tracker_that_cannot_start_costs_one_line(tmp_path: Path, accelerator: Accelerator) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way")
    (tmp_path / "memory.csv").mkdir()
    said: list[str] = []
    log = RunLog(tmp_path, accelerator, warn=said.append)
    log_a_run(log)
    log.finish(results())
    assert len(said) == 2
    assert said[0].startswith("tensorboard tracker stopped, the run goes on without it: ")
    assert said[1].startswith("memory.csv cannot be written")
    assert len(read_log(tmp_path / "metrics.csv")) == 6


class Breaking(GeneralTracker):
    name = "breaking"
    requires_logging_directory = False
    tracker = None

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls += 1
        raise self.error


def test_a_tracker_that_breaks_is_told_nothing_more() -> None:
    said: list[str] = []
    inner = Breaking(ConnectionError("no\nroute"))
    tracker = Forgiving(inner, said.append)
    tracker.log({"x": 1})
    tracker.log({"x": 2})
    tracker.finish()
    assert (inner.calls, said) == (1, ["breaking tracker stopped, the run goes on without it: no route"])


def test_a_programming_error_in_a_tracker_is_not_hidden() -> None:
    with pytest.raises(AttributeError):
        Forgiving(Breaking(AttributeError("typo")), print).log({"x": 1})


def test_wandb_offline(tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"project": "demo", "name": "first", "group": "g", "tags": ["a", "b"], "mode": "offline"}
    said: list[str] = []
    log = RunLog(tmp_path, accelerator, wandb=options, config={"train": {"lr": 1e-3}}, warn=said.append)
    run = accelerator.get_tracker("wandb").tracker
    log_a_run(log)
    assert (run.project, run.name, run.group, tuple(run.tags)) == ("demo", "first", "g", ("a", "b"))
    assert run.config["train.lr"] == 1e-3
    log.finish(results())
    assert said == []
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert folder.name.endswith(run_id)
    import wandb

    wandb.teardown()  # its process may still be writing
    # The file `wandb sync` uploads: protobuf records whose keys and JSON values stand in it as text.
    recorded = (folder / f"run-{run_id}.wandb").read_bytes()
    assert repr(results().learning_accuracy).encode() in recorded
    for key in (
        b"learning_accuracy",
        b"curvature/task1_digits/eigenvalue_2",
        b"memory/rank0/cpu_mb",
        b"train.lr",
    ):
        assert key in recorded


def test_wandb_without_an_account_costs_one_line(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    said: list[str] = []
    log = RunLog(tmp_path, accelerator, wandb={"mode": "online"}, tensorboard=False, warn=said.append)
    log_a_run(log)
    log.finish(results())
    (line,) = said
    assert line.startswith("wandb tracker stopped, the run goes on without it: ")
    assert len(read_log(tmp_path / "metrics.csv")) == 6


def test_flatten_makes_values_that_trackers_take() -> None:
    config = {"a": {"b": 1, "c": None, "d": {}}, "e": [1, {"f": 2}], "g": True}
    expected = {"a.b": 1, "a.c": "null", "a.d": "{}", "e": '[1, {"f": 2}]', "g": True}
    assert flatten(config) == expected
