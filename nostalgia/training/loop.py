"""Trains one task, or one phase of it: wrap, epochs of steps, unwrap."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import get_scheduler

from nostalgia.data.stream import TaskLoader
from nostalgia.errors import RunFailedError
from nostalgia.methods.base import StepRule
from nostalgia.parallel.modules import bare_module
from nostalgia.training.step import StepResult, train_step
from nostalgia.training.task_model import TaskModel


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How a phase is optimised. Times are in epochs, rates per step."""

    epochs: int
    optimizer: str = "adamw"  # adamw or sgd
    lr: float = 3e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    scheduler: str = "cosine"  # cosine (to zero) or constant, both after a linear warm-up
    warmup_epochs: float = 5.0
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class StepRecord:
    """One logged step; loss and accuracy are over the step's samples on all ranks."""

    step: int  # since the start of the phase, from 1
    epoch: int
    loss: float
    accuracy: float
    lr: float
    grad_norm: float
    projected_fraction: float | None
    images_per_s: float


class Observer(Protocol):
    """What wants to know how training goes. All ranks call it; it decides who speaks."""

    def phase_started(self, epochs: int, steps_per_epoch: int) -> None: ...

    def step_taken(self, step: int, record: StepRecord | None) -> None:
        """After every step; ``record`` only every ``log_every``-th and at the end of an epoch."""

    def epoch_finished(self, epoch: int, step: int, model: nn.Module, leak: float | None) -> None:
        """After every epoch, with the wrapped model: the place to validate."""


@dataclass
class Phase:
    """Everything `run_phase` needs besides the model and the data."""

    accelerator: Accelerator
    optimization: Optimization
    observer: Observer
    rule: Callable[[Mapping[str, nn.Parameter]], StepRule]
    projected: tuple[str, ...] = ()  # names of the projected parameters within the backbone
    log_every: int = 50
    max_steps_per_epoch: int | None = None
    guard: Callable[[dict[str, torch.Tensor], str], None] | None = None  # checks that ranks agree
    guard_every: int = 0
    frozen_backbone: bool = False  # head warm-up: the backbone in evaluation mode
    where: str = ""  # prefix of error lines: "task 2 (task2_digits)"
    _clock: float = field(default=0.0, init=False)
    _images: int = field(default=0, init=False)


def run_phase(model: TaskModel, loader: TaskLoader, phase: Phase) -> TaskModel:
    """Train the parameters of ``model`` that require a gradient; returns an ordinary module with the result.

    ``requires_grad`` must be set before: DDP and FSDP2 read it when they wrap, which happens here, once a phase.
    Raises RunFailedError naming the place where the loss or gradient was not finite.
    """
    accelerator, options = phase.accelerator, phase.optimization
    optimizer = make_optimizer(model, options)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    parameters = projected_parameters(wrapped, phase.projected)
    rule = phase.rule(parameters)
    steps_per_epoch = loader.steps_per_epoch
    if phase.max_steps_per_epoch is not None:
        steps_per_epoch = min(steps_per_epoch, phase.max_steps_per_epoch)
    scheduler = make_scheduler(prepared.optimizer, options, steps_per_epoch)
    phase.observer.phase_started(options.epochs, steps_per_epoch)
    taken = 0
    for epoch in range(1, options.epochs + 1):
        set_training_mode(wrapped, phase.frozen_backbone)
        phase._clock, phase._images = time.perf_counter(), 0
        for i, step in enumerate(loader.epoch(epoch)):
            if i == steps_per_epoch:
                break
            try:
                result = train_step(
                    wrapped,
                    prepared,
                    rule,
                    step,
                    accelerator=accelerator,
                    max_grad_norm=options.max_grad_norm,
                    label_smoothing=options.label_smoothing,
                )
            except RunFailedError as error:
                raise RunFailedError(f"{phase.where}, {error}") from None
            taken += 1
            lr = scheduler.get_last_lr()[0]
            if not result.skipped:
                scheduler.step()
            log = taken % phase.log_every == 0 or i + 1 == steps_per_epoch
            phase._images += result.num_samples
            record = make_record(phase, taken, epoch, lr, result) if log else None
            phase.observer.step_taken(taken, record)
            if phase.guard is not None and phase.guard_every and taken % phase.guard_every == 0:
                phase.guard(dict(parameters), f"{phase.where}, epoch {epoch}, step {taken}")
        phase.observer.epoch_finished(epoch, taken, wrapped, rule.leak())
    trained = bare_module(wrapped)
    # A gradient left behind would count in the norm that a later phase clips by, where the backbone is frozen.
    trained.zero_grad(set_to_none=True)
    accelerator.free_memory()
    return trained


def make_optimizer(model: nn.Module, options: Optimization) -> Optimizer:
    """The optimizer over the parameters that require a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if options.optimizer == "sgd":
        return SGD(parameters, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    return AdamW(parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)


def make_scheduler(
    optimizer: Optimizer, options: Optimization, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then cosine to zero or constant; one call to ``step`` a taken optimizer step, on every rank."""
    total = max(1, options.epochs * steps_per_epoch)
    name = "cosine" if options.scheduler == "cosine" else "constant_with_warmup"
    warmup = min(int(options.warmup_epochs * steps_per_epoch), total - 1)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)


def projected_parameters(wrapped: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters of the wrapped model's backbone called ``names``, as they are trained (plain or DTensor)."""
    module = getattr(wrapped, "module", wrapped)
    available = dict(module.backbone.named_parameters())
    return {name: available[name] for name in names}


def set_training_mode(wrapped: nn.Module, frozen_backbone: bool) -> None:
    wrapped.train()
    if frozen_backbone:
        getattr(wrapped, "module", wrapped).backbone.eval()


def make_record(phase: Phase, taken: int, epoch: int, lr: float, result: StepResult) -> StepRecord:
    """Reduce a step's sums over ranks; the rate is that of the images since the last record."""
    sums = torch.stack([result.loss_sum.double(), result.correct.double()])
    loss, correct = phase.accelerator.reduce(sums, "sum").tolist()
    now = time.perf_counter()
    rate = phase._images / max(now - phase._clock, 1e-9)
    phase._clock, phase._images = now, 0
    fraction = result.projected_fraction
    return StepRecord(
        step=taken,
        epoch=epoch,
        loss=loss / result.num_samples,
        accuracy=correct / result.num_samples,
        lr=lr,
        grad_norm=result.grad_norm,
        projected_fraction=None if fraction is None else float(fraction),
        images_per_s=rate,
    )
