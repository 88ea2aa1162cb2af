"""The phases of training within a run: heads with the backbone, or a new head alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from nostalgia.config.schema import Config
from nostalgia.data.stream import TaskLoader
from nostalgia.data.tasks import Task
from nostalgia.evaluation.accuracy import Score
from nostalgia.experiment.components import Components
from nostalgia.experiment.context import task_context
from nostalgia.experiment.heads import heads_in_training, new_heads
from nostalgia.experiment.observer import PhaseObserver
from nostalgia.methods.finetune import Finetune
from nostalgia.models.adapters import restart_adapters
from nostalgia.models.task_model import TaskModel
from nostalgia.parallel.accelerator import wrap_by_layer
from nostalgia.parallel.guard import check_consistency
from nostalgia.training.loop import Optimization, Phase, Training

if TYPE_CHECKING:
    from nostalgia.experiment.experiment import Experiment


class Phases:
    """Trains what a round trains, and holds the phase in progress, which a checkpoint saves and a resumed run goes on in."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.training: Training | None = None  # of the phase in progress
        self.observer: PhaseObserver | None = None  # of it

    def train(self, tasks: Sequence[Task], fitted: nn.Module | None) -> None:
        """Train ``tasks`` by the run's method; ``fitted`` is the first task's head where it is fitted already."""
        experiment, state = self.experiment, self.experiment.state
        run, progress, evaluator = experiment.c, experiment.progress, experiment.evaluator
        first, alone = tasks[0], len(tasks) == 1
        if first.index > 1 and not experiment.resumes_a_phase:
            begin_adapters_anew(run, first)
        heads = heads_in_training(run, new_heads(run, tasks) if fitted is None else {first.head: fitted})
        names, name = list(heads), first.name if alone else "joint"
        places = [names.index(task.head) for task in tasks]
        validate = None
        if alone:
            validate = lambda model: evaluator.score(model, first, places[0], experiment.checkpoints.pause_point)  # noqa: E731
        observer = PhaseObserver(progress, experiment.log, name, state.step, validate=validate)
        model = self._fit(
            run.backbone,
            tasks,
            heads,
            run.loader(list(tasks), train=True, name=name, heads=places),
            run.epochs(first) if alone else run.config.train.epochs,
            observer,
        )
        state.step, state.metrics, state.tasks = state.step + observer.steps, observer.metrics, tasks[-1].index
        run.take_trained(model, names, len(tasks))

    def compare_ranks(self, model: nn.Module, where: str) -> None:
        """Raise RunFailedError, on every rank, where the method has left whole weights or its own tensors apart."""
        run = self.experiment.c
        if run.config.train.guard_every_n_steps:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            check_consistency({**trained, **run.method.replicated_tensors()}, where)

    def fit_head(self, task: Task, backbone: nn.Module, *, record: bool) -> tuple[nn.Module, Score]:
        """Train a new head on ``backbone``, which stays as it is; ``record``: as a part of the run."""
        experiment = self.experiment
        run, evaluator = experiment.c, experiment.evaluator
        observer = PhaseObserver(
            experiment.progress,
            experiment.log,
            task.name,
            experiment.state.step,
            label="warmup",
            record=record,
            finish=lambda model: evaluator.score(model, task, 0, experiment.checkpoints.pause_point),
        )
        backbone.set_trainable(False)  # type: ignore[operator]
        epochs = run.config.train.head_warmup_epochs
        loader = run.loader([task], train=True)
        model = self._fit(backbone, [task], new_heads(run, [task]), loader, epochs, observer, head_only=True)
        model.backbone.set_trainable(True)  # type: ignore[operator]
        if record:
            experiment.state.step += observer.steps
            run.backbone = model.backbone  # type: ignore[assignment]
        assert observer.score is not None
        return model.heads[0], observer.score

    def _fit(
        self,
        backbone: nn.Module,
        tasks: Sequence[Task],
        heads: dict[str, nn.Module],
        loader: TaskLoader,
        epochs: int,
        observer: PhaseObserver,
        *,
        head_only: bool = False,
    ) -> TaskModel:
        """Train heads, with the backbone and by the run's method unless ``head_only``; returns them, unwrapped."""
        run = self.experiment.c
        train = run.config.train
        wrap_by_layer(run.accelerator, backbone)
        method = Finetune(Finetune.Config(), run.method.seed) if head_only else run.method
        frozen = head_only or method.frozen_backbone
        if frozen and not head_only:
            backbone.set_trainable(False)  # type: ignore[operator]
        phase = Phase(
            accelerator=run.accelerator,
            optimization=optimization(run.config, epochs, head_only=head_only),
            observer=observer,
            method=method,
            context=task_context(run, tasks, nn.Identity(), list(heads), no_pause),
            scope=() if frozen else run.scope,
            log_every=train.log_every_n_steps,
            max_steps_per_epoch=train.max_steps_per_epoch,
            frozen_backbone=frozen,
            guard=lambda parameters, where: check_consistency({**parameters, **run.method.replicated_tensors()}, where),
            guard_every=train.guard_every_n_steps,
            where=observer.task,
            after_step=self._after_step,
        )
        self.training, self.observer = Training(TaskModel(backbone, list(heads.values())), loader, phase), observer
        if self.experiment.resumes_a_phase:
            self._resume(self.training, observer)
        model = self.training.run()
        state = self.experiment.state
        state.training_overhead, state.between_overhead = self.overhead()
        self.training = self.observer = None
        if frozen and not head_only:
            model.backbone.set_trainable(True)  # type: ignore[operator]
        return model

    def _resume(self, training: Training, observer: PhaseObserver) -> None:
        """Go on where the run was interrupted within the phase."""
        experiment, resumed = self.experiment, self.experiment.resumed
        assert resumed is not None
        assert resumed.phase is not None
        training.restore(resumed.phase, resumed.source)
        if training.phase.method is experiment.c.method:
            experiment.run_checkpoint.load_method(resumed.source)
        observer.metrics = experiment.state.metrics
        experiment.finish_resuming()

    def overhead(self) -> tuple[float, float]:
        """Seconds that the method has added to the run's training and between tasks, with those of the phase in progress."""
        state, training = self.experiment.state, self.training
        if training is None or training.phase.method is not self.experiment.c.method:
            return state.training_overhead, state.between_overhead
        return state.training_overhead + training.clock.seconds, state.between_overhead + training.begin_seconds

    def _after_step(self, epoch_done: bool) -> None:
        assert self.training is not None
        self.experiment.checkpoints.after_step(self.training.taken, epoch_done)


def no_pause(work: int, done: int, of: int, label: str = "") -> None:
    """Between steps the loop itself is where a run may stop."""


def begin_adapters_anew(run: Components, task: Task) -> None:
    """Merge the adapters into the weights, where the method or ``model.lora.merge`` wants it."""
    if run.method.restarts_adapters:
        restart_adapters(run.backbone, run.config.experiment.seed * 1000 + task.index)
    elif run.merges_adapters:
        restart_adapters(run.backbone, None)


def optimization(config: Config, epochs: int, *, head_only: bool = False) -> Optimization:
    """How a phase is optimised; the head's warm-up has a constant rate from the start."""
    train = config.train
    head_lr = train.head_lr or train.lr
    return Optimization(
        epochs=epochs,
        optimizer=train.optimizer,
        lr=train.lr,
        head_lr=(train.head_warmup_lr or head_lr) if head_only else head_lr,
        weight_decay=train.weight_decay,
        betas=(train.betas[0], train.betas[1]),
        momentum=train.momentum,
        scheduler="constant" if head_only else train.scheduler,
        warmup_epochs=0 if head_only else train.warmup_epochs,
        max_grad_norm=train.max_grad_norm,
    )
