"""Follows one phase of training: progress display, metrics, validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from nostalgia.evaluation.accuracy import Score
from nostalgia.logging.progress import Progress
from nostalgia.logging.run_log import RunLog
from nostalgia.training.loop import StepRecord


@dataclass
class PhaseObserver:
    """Hands what a phase tells to the display and the log; ``start_step`` counts the run's steps before it."""

    progress: Progress
    log: RunLog
    task: str
    start_step: int
    label: str = "train"  # train or warmup
    validate: Callable[[nn.Module], Score] | None = None
    record: bool = True  # whether the phase is part of the run, or a measurement beside it
    finish: Callable[[nn.Module], Score] | None = None  # measures the trained model, still wrapped
    score: Score | None = None  # what `finish` gave
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # of the method, at the end of the latest epoch

    def phase_started(self, epochs: int, steps_per_epoch: int, taken: int) -> None:
        self.steps = taken
        self.progress.phase(epochs, steps_per_epoch, self.label, taken)

    def step_taken(self, step: int, record: StepRecord | None) -> None:
        self.steps = step
        if record is None:
            self.progress.step()
            return
        self.progress.step(record.loss, record.images_per_s)
        if self.record:
            self.log.train_step(
                step=self.start_step + step,
                task=self.task,
                epoch=record.epoch,
                loss=record.loss,
                accuracy=record.accuracy,
                lr=record.lr,
                grad_norm=record.grad_norm,
                metrics=record.metrics,
                images_per_s=record.images_per_s,
                split=self.label,
            )

    def epoch_finished(self, epoch: int, step: int, model: nn.Module, metrics: dict[str, float]) -> None:
        self.metrics, leak = metrics, metrics.get("leak")
        if self.validate is None:
            return
        score = self.validate(model)
        self.progress.epoch(epoch, loss=score.loss, accuracy=score.accuracy, leak=leak)
        self.log.validation(
            step=self.start_step + step,
            task=self.task,
            epoch=epoch,
            loss=score.loss,
            accuracy=score.accuracy,
            metrics=metrics,
        )
        self.log.memory(self.start_step + step)

    def phase_finished(self, model: nn.Module) -> None:
        if self.finish is not None:
            self.score = self.finish(model)
