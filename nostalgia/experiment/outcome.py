"""What a run says and leaves of its outcome: its log, a line a task, its results."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from nostalgia.data.tasks import Task
from nostalgia.experiment.components import Components
from nostalgia.experiment.info import device_name
from nostalgia.experiment.state import RunState
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.logging.console import TaskOutcome, task_row
from nostalgia.logging.results import RunResults
from nostalgia.logging.run_log import RunLog
from nostalgia.logging.trackers import Warn
from nostalgia.parallel.accelerator import strategy
from nostalgia.utils.own_code import code_of
from nostalgia.utils.versions import versions


def make_log(run: Components, folder: Path, warn: Warn, position: dict[str, int] | None) -> RunLog:
    """The run's log; with ``position`` it goes on from there."""
    logger = run.config.logger
    wandb = {
        "project": logger.project,
        "entity": logger.entity,
        "name": logger.name,
        "group": logger.group,
        "tags": logger.tags,
        "mode": logger.mode,
    }
    return RunLog(
        folder,
        run.accelerator,
        tensorboard=logger.tensorboard,
        wandb=wandb if logger.use_wandb else None,
        save_dir=None if logger.save_dir is None else Path(logger.save_dir),
        config=OmegaConf.to_container(OmegaConf.structured(run.config), resolve=True),  # type: ignore[arg-type]
        resume=position,
        warn=warn,
    )


def say_outcome(
    console: Console, run: Components, state: RunState, task: Task, pairs: Eigenpairs | None, seconds: float
) -> None:
    """A panel on the task that has just been evaluated."""
    count = len(run.tasks)
    columns = run.method.report().get("memory_basis", {}).get("columns")
    outcome = TaskOutcome(
        index=task.index,
        total=count,
        tasks=[t.name for t in run.tasks],
        matrix=state.matrix + [[None] * count for _ in range(count - len(state.matrix))],
        seconds=seconds,
        eigenvalues=None if pairs is None else pairs.eigenvalues.tolist(),
        converged=None if pairs is None else int(pairs.converged.sum()),
        products=None if pairs is None else pairs.products,
        leak=state.metrics.get("leak"),
        memory_columns=columns,
    )
    console.print(task_row(outcome))


def run_results(run: Components, state: RunState, seconds: float, checkpoint_seconds: float) -> RunResults:
    """The results of a finished run."""
    warm = run.config.train.head_warmup_epochs > 0 and not run.method.joint
    return RunResults.of(
        tasks=[t.name for t in run.tasks],
        classes=[t.classes for t in run.tasks],
        accuracy_matrix=state.matrix,
        class_incremental_matrix=state.class_incremental,
        before_accuracies=state.before if warm else None,
        baseline_accuracies=state.baseline if warm else None,
        memory_bytes=state.memory_bytes,
        overhead_seconds={"training": state.training_overhead, "between_tasks": state.between_overhead},
        method=run.method.name,
        seed=run.config.experiment.seed,
        world_size=run.accelerator.num_processes,
        seconds=seconds,
        versions=versions(),
        details={
            **({"method_code": code} if (code := code_of(type(run.method))) else {}),
            "model": run.config.model.name,
            "seconds_per_task": state.seconds,
            "device": device_name(run.accelerator),
            "strategy": strategy(run.accelerator),
            "precision": run.precision,
            "checkpoint_seconds": checkpoint_seconds,
            "method": run.config.method,
        },
    )
