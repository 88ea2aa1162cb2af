"""Trains one task, or one phase of it: wrap, epochs of steps, unwrap. It can be stopped after any step and go on."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from nostalgia.checkpoint.store import readable_checkpoint
from nostalgia.data.stream import TaskLoader
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.methods.base import Method, TaskContext
from nostalgia.models.task_model import TaskModel
from nostalgia.parallel import tensors
from nostalgia.parallel.modules import bare_module, inner_module, named_parameters
from nostalgia.training.optimizers import make_optimizer
from nostalgia.training.overhead import OverheadClock
from nostalgia.training.step import StepResult, train_step

WARMUP_SHARE = 0.2  # of a phase, at most


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How a phase is optimised. Times are in epochs, rates per step."""

    epochs: int
    optimizer: str = "adamw"  # one of OPTIMIZERS
    lr: float = 3e-4
    head_lr: float | None = None  # None: lr
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    scheduler: str = "cosine"  # cosine (to zero) or constant, both after a linear warm-up
    warmup_epochs: float = 5.0
    max_grad_norm: float | None = 1.0


@dataclass(frozen=True)
class StepRecord:
    """One logged step; loss and accuracy are over the step's samples on all ranks."""

    step: int  # since the start of the phase, from 1
    epoch: int
    loss: float
    accuracy: float
    lr: float
    grad_norm: float
    images_per_s: float
    metrics: dict[str, float]  # of the method


class Observer(Protocol):
    """What wants to know how training goes. All ranks call it; it decides who speaks."""

    def phase_started(self, epochs: int, steps_per_epoch: int, taken: int) -> None:
        """``taken`` steps of the phase were taken before, by a former part of the run."""

    def step_taken(self, step: int, record: StepRecord | None) -> None:
        """After every step; ``record`` only every ``log_every``-th and at the end of an epoch."""

    def epoch_finished(self, epoch: int, step: int, model: nn.Module, metrics: dict[str, float]) -> None:
        """After every epoch, with the wrapped model and the method's metrics: the place to validate."""

    def phase_finished(self, model: nn.Module) -> None:
        """After the last epoch, with the wrapped model."""


@dataclass
class SavedPhase:
    """A phase between two steps: ``position`` is plain JSON, ``tensors`` are whole, on rank 0's CPU."""

    position: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass
class Phase:
    """Everything `Training` needs besides the model and the data."""

    accelerator: Accelerator
    optimization: Optimization
    observer: Observer
    method: Method
    context: TaskContext  # its model and parameters are put in here, once wrapped
    scope: tuple[str, ...] = ()  # names of the parameters in scope, within the backbone
    log_every: int = 50
    max_steps_per_epoch: int | None = None
    guard: Callable[[dict[str, Tensor], str], None] | None = None  # checks that ranks agree
    guard_every: int = 0
    frozen_backbone: bool = False  # head warm-up: the backbone in evaluation mode
    where: str = ""  # prefix of error lines: "task 2 (task2_digits)"
    after_step: Callable[[bool], None] | None = None  # the place for checkpoints; True after an epoch's validation


class Training:
    """One phase in progress.

    ``requires_grad`` must be set before: DDP and FSDP2 read it when they wrap, which happens here, once a phase.
    ``epoch`` counts from 1, ``step`` within it from 0; ``step == steps_per_epoch`` is an epoch whose validation is
    still to come.
    """

    def __init__(self, model: TaskModel, loader: TaskLoader, phase: Phase) -> None:
        self.phase, self.loader = phase, loader
        options = phase.optimization
        optimizer = make_optimizer(model, options.optimizer, vars(options))
        self.wrapped, self.optimizer = phase.accelerator.prepare(model, optimizer)
        self.parameters = scope_parameters(self.wrapped, phase.scope)
        self.clock = OverheadClock(self.wrapped, self.optimizer.optimizer, phase.accelerator.device)
        self.method = phase.method
        started = time.perf_counter()
        phase.context.model, phase.context.parameters = self.wrapped, self.parameters
        self.method.task = phase.context
        self.method.begin_task(phase.context)
        if held := [name for name, p in self.parameters.items() if not p.requires_grad]:
            raise UsageError(
                f"method={self.method.name}: begin_task left requires_grad of {held[0]} false, which is in scope; to hold "
                "parameters still zero their gradients in `gradients`, or take them out by model.scope"
            )
        self.begin_seconds = time.perf_counter() - started
        self.steps_per_epoch = loader.steps_per_epoch
        if phase.max_steps_per_epoch is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, phase.max_steps_per_epoch)
        self.scheduler = make_scheduler(self.optimizer.optimizer, options, self.steps_per_epoch)
        self.epoch, self.step, self.taken = 1, 0, 0
        self._clock, self._images = time.perf_counter(), 0

    @property
    def backbone(self) -> nn.Module:
        """As it is trained: wrapped where the strategy wraps by layer."""
        return backbone_of(self.wrapped)

    def run(self) -> TaskModel:
        """Train to the end; returns an ordinary module with the result.

        Raises RunFailedError naming the place where the loss or gradient was not finite.
        """
        phase, epochs = self.phase, self.phase.optimization.epochs
        phase.observer.phase_started(epochs, self.steps_per_epoch, self.taken)
        while self.epoch <= epochs:
            self._run_epoch()
            phase.observer.epoch_finished(self.epoch, self.taken, self.wrapped, self._metrics())
            self.epoch, self.step = self.epoch + 1, 0
            if phase.after_step is not None:
                phase.after_step(True)
        self._compare_ranks("after the last step")
        phase.observer.phase_finished(self.wrapped)
        self.clock.remove()
        trained = cast(TaskModel, bare_module(self.wrapped))
        # A gradient left behind would count in the norm that a later phase clips by, where the backbone is frozen.
        trained.zero_grad(set_to_none=True)
        phase.accelerator.free_memory()
        return trained

    def capture(self) -> SavedPhase:
        """Where the phase stands, the heads in training and the optimizer; the backbone is its owner's to keep.

        A collective: all ranks call it, between two steps.
        """
        position = {
            "epoch": self.epoch,
            "step": self.step,
            "taken": self.taken,
            "scheduler": self.scheduler.last_epoch,
        }
        return SavedPhase(position, tensors.to_main({**self._heads(), **self._optimizer_state()}))

    def restore(self, state: SavedPhase, source: str) -> None:
        """Go on from ``state``, given whole on rank 0 (tensors may be missing on others); the backbone has its values.

        Raises NotFoundError, naming ``source``, where the state is not one of this phase.
        """
        with readable_checkpoint(source):
            self._restore(state, source)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _restore(self, state: SavedPhase, source: str) -> None:
        position = state.position
        self.epoch, self.step, self.taken = position["epoch"], position["step"], position["taken"]
        self._make_optimizer_state(
            tensors.broadcast_object({name: tuple(value.shape) for name, value in sorted(state.tensors.items())})
        )
        tensors.from_main({**self._heads(), **self._optimizer_state()}, state.tensors, source)
        self.scheduler.last_epoch = position["scheduler"] - 1
        self._advance_rate()

    def _run_epoch(self) -> None:
        phase = self.phase
        set_training_mode(self.wrapped, phase.frozen_backbone)
        self._clock, self._images = time.perf_counter(), 0
        if self.step == self.steps_per_epoch:
            return
        for step in self.loader.epoch(self.epoch, self.step):
            self._take_step(step)
            if self.step == self.steps_per_epoch:
                break
            if phase.after_step is not None:
                phase.after_step(False)

    def _take_step(self, step: Any) -> None:
        phase, options = self.phase, self.phase.optimization
        try:
            with self.clock.of_step(self.taken + 1):
                result = train_step(
                    self.wrapped,
                    self.optimizer,
                    self.method,
                    step,
                    accelerator=phase.accelerator,
                    max_grad_norm=options.max_grad_norm,
                    clock=self.clock,
                )
        except RunFailedError as error:
            raise RunFailedError(f"{phase.where}, {error}") from None
        self.taken, self.step = self.taken + 1, self.step + 1
        lr = float(self.scheduler.get_last_lr()[0])
        if not result.skipped:
            self._advance_rate()
        self._images += result.num_samples
        log = self.taken % phase.log_every == 0 or self.step == self.steps_per_epoch
        phase.observer.step_taken(self.taken, self._record(lr, result) if log else None)
        if self.taken % max(1, phase.guard_every) == 0:
            self._compare_ranks(f"epoch {self.epoch}, step {self.step}")

    def _metrics(self) -> dict[str, float]:
        """The method's numbers, but for those of a step that float16 left out; UsageError for what is none."""
        found = {}
        for name, value in self.method.metrics().items():
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError):
                number = math.nan
            if math.isfinite(number):
                found[name] = number
            elif self.phase.accelerator.scaler is None:
                raise UsageError(
                    f"method={self.method.name}: metrics() gave {name}={value!r:.60}; allowed are finite numbers"
                )
        return found

    def _compare_ranks(self, when: str) -> None:
        if self.phase.guard is not None and self.phase.guard_every:
            self.phase.guard(dict(self.parameters), f"{self.phase.where}, {when}")

    def _advance_rate(self) -> None:
        """A step of the scheduler, without torch's warning of its order.

        torch counts the optimizer's steps of this process alone, not those before a resume, and only those of the method it
        found at first, which Accelerate replaces where gradients are scaled.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.*")
            self.scheduler.step()

    def _record(self, lr: float, result: StepResult) -> StepRecord:
        """Reduce a step's sums over ranks; the rate is that of the images since the last record."""
        sums = torch.stack([result.loss_sum.double(), result.correct.double()])
        loss, correct = self.phase.accelerator.reduce(sums, "sum").tolist()
        now = time.perf_counter()
        rate = self._images / max(now - self._clock, 1e-9)
        self._clock, self._images = now, 0
        return StepRecord(
            step=self.taken,
            epoch=self.epoch,
            loss=loss / result.num_samples,
            accuracy=correct / result.num_samples,
            lr=lr,
            grad_norm=result.grad_norm,
            images_per_s=rate,
            metrics=self._metrics(),
        )

    def _heads(self) -> dict[str, Tensor]:
        return {name: p for name, p in named_parameters(self.wrapped).items() if name.startswith("heads.")}

    def _optimizer_state(self) -> dict[str, Tensor]:
        """``optimizer/<key>/<parameter>`` of every parameter in training, as the optimizer holds it."""
        state = self.optimizer.optimizer.state
        return {
            f"optimizer/{key}/{name}": value
            for name, parameter in named_parameters(self.wrapped).items()
            for key, value in state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def _make_optimizer_state(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tensors to restore into: like the parameter, of a shape of their own (Adafactor's), or a number (``step``)."""
        parameters = named_parameters(self.wrapped)
        for full, shape in shapes.items():
            kind, _, rest = full.partition("/")
            key, _, name = rest.partition("/")
            if kind == "optimizer" and name in parameters:
                parameter = parameters[name].detach()
                alike = torch.zeros_like(parameter) if shape == parameter.shape else parameter.new_zeros(shape)
                self.optimizer.optimizer.state[parameters[name]][key] = torch.tensor(0.0) if key == "step" else alike


def make_scheduler(
    optimizer: Optimizer, options: Optimization, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up from the first step on, then cosine to zero or constant; one ``step`` a taken optimizer step.

    The warm-up takes at most `WARMUP_SHARE` of the phase: a rate that only rises would never come down.
    """
    total = max(1, options.epochs * steps_per_epoch)
    warmup = min(int(options.warmup_epochs * steps_per_epoch), int(WARMUP_SHARE * total))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if options.scheduler != "cosine":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def backbone_of(wrapped: nn.Module) -> nn.Module:
    return cast(TaskModel, inner_module(wrapped)).backbone


def scope_parameters(wrapped: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters of the wrapped model's backbone called ``names``, as they are trained (plain or DTensor)."""
    available = dict(backbone_of(wrapped).named_parameters())
    return {name: available[name] for name in names}


def set_training_mode(wrapped: nn.Module, frozen_backbone: bool) -> None:
    wrapped.train()
    if frozen_backbone:
        backbone_of(wrapped).eval()
