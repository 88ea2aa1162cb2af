"""One phase of training within a run: heads with the backbone, or a new head alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from nostalgia.config.schema import Config
from nostalgia.data.tasks import Task
from nostalgia.experiment.components import Components
from nostalgia.experiment.observer import PhaseObserver
from nostalgia.methods.base import TaskContext
from nostalgia.methods.finetune import Finetune
from nostalgia.models.adapters import restart_adapters
from nostalgia.models.task_model import TaskModel
from nostalgia.parallel.accelerator import wrap_by_layer
from nostalgia.parallel.guard import check_consistency
from nostalgia.training.loop import Optimization, Phase, Training

if TYPE_CHECKING:
    from nostalgia.experiment.experiment import Experiment


def fit_phase(
    experiment: Experiment,
    backbone: nn.Module,
    heads: list[nn.Module],
    loader: Any,
    epochs: int,
    observer: PhaseObserver,
    context: TaskContext,
    *,
    head_only: bool = False,
) -> TaskModel:
    """Train heads, with the backbone and by the run's method unless ``head_only``; returns them, unwrapped."""
    run, config = experiment.c, experiment.config
    wrap_by_layer(run.accelerator, backbone)
    method = Finetune(Finetune.Config(), run.method.seed) if head_only else run.method
    frozen = head_only or method.frozen_backbone
    if frozen and not head_only:
        backbone.set_trainable(False)  # type: ignore[operator]
    phase = Phase(
        accelerator=run.accelerator,
        optimization=optimization(config, epochs, head_only=head_only),
        observer=observer,
        method=method,
        context=context,
        scope=() if frozen else run.scope,
        log_every=config.train.log_every_n_steps,
        max_steps_per_epoch=config.train.max_steps_per_epoch,
        frozen_backbone=frozen,
        guard=lambda parameters, where: check_consistency({**parameters, **run.method.replicated_tensors()}, where),
        guard_every=config.train.guard_every_n_steps,
        where=observer.task,
        after_step=experiment.after_step,
    )
    training = Training(TaskModel(backbone, heads), loader, phase)
    experiment.begin_phase(training, observer)
    model = training.run()
    experiment.end_phase()
    if frozen and not head_only:
        model.backbone.set_trainable(True)  # type: ignore[operator]
    return model


def begin_adapters_anew(run: Components, task: Task) -> None:
    """Merge the adapters into the weights, where the method or ``model.lora.merge`` wants it."""
    if run.method.restarts_adapters:
        restart_adapters(run.backbone, run.config.experiment.seed * 1000 + task.index)
    elif run.merges_adapters:
        restart_adapters(run.backbone, None)


def optimization(config: Config, epochs: int, *, head_only: bool = False) -> Optimization:
    """How a phase is optimised; the head's warm-up has a constant rate from the start."""
    train = config.train
    return Optimization(
        epochs=epochs,
        optimizer=train.optimizer,
        lr=(train.head_warmup_lr or train.lr) if head_only else train.lr,
        weight_decay=train.weight_decay,
        betas=(train.betas[0], train.betas[1]),
        momentum=train.momentum,
        scheduler="constant" if head_only else train.scheduler,
        warmup_epochs=0 if head_only else train.warmup_epochs,
        max_grad_norm=train.max_grad_norm,
    )
