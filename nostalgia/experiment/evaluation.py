"""Scores of a run's tasks on their validation images."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from nostalgia.data.tasks import Task
from nostalgia.evaluation.accuracy import Score, evaluate
from nostalgia.experiment.components import Components
from nostalgia.models import norm_statistics

Pause = Callable[[], None]


class Evaluator:
    """Evaluates a run's networks; evaluation images are few and read after every task, so their loaders are made once.

    ``pause`` is called before each batch: where a run that was asked to stop may do so. All ranks call every method.
    """

    def __init__(self, run: Components) -> None:
        self.run = run
        self.loaders = [run.loader([task], train=False) for task in run.tasks]

    def score(self, model: nn.Module, task: Task, head: int, pause: Pause | None = None) -> Score:
        """Of ``model``, whose head number ``head`` is the task's."""
        limit = self.run.config.train.max_eval_batches
        return evaluate(model, self.loaders[task.index - 1], self.run.accelerator, limit, pause, head=head)

    def score_finished(self, task: Task, pause: Pause | None = None) -> Score:
        """Of the run's network with all heads so far.

        Where the task is known it has its own batch-norm statistics (`Components.statistics_of`), where it is not those of the
        network as it stands.
        """
        run = self.run
        model, head = run.model(), list(run.heads).index(task.head)
        own, latest = run.statistics_of(task), run.norm_statistics[-1]
        if not own or task.index == len(run.norm_statistics):
            return self.score(model, task, head, pause)
        with norm_statistics.using(run.backbone, own):
            known = self.score(model, task, head, pause)
        with norm_statistics.using(run.backbone, latest):
            unknown = self.score(model, task, head, pause)
        return Score(known.accuracy, known.loss, known.correct, known.num_samples, unknown.class_incremental)

    def mean_accuracy(self) -> float:
        """Over the tasks seen, each known; a run does not stop within."""
        seen = self.run.tasks[: len(self.run.norm_statistics)]
        return sum(self.score_finished(task).accuracy for task in seen) / len(seen)
