"""The tail of the curvature's spectrum: a penalty on what finished tasks' top eigenspaces leave out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nostalgia.curvature.context import float32_products
from nostalgia.curvature.fisher import diagonal_fisher
from nostalgia.curvature.kronecker import KroneckerFactors, kronecker_factors
from nostalgia.errors import UsageError
from nostalgia.linalg.block import Block
from nostalgia.methods.base import TaskContext
from nostalgia.methods.vectors import QuadraticPenalty, training_space
from nostalgia.parallel.modules import inner_module
from nostalgia.parallel.tensors import world_size
from nostalgia.projection import KroneckerMemory

TAILS = ("none", "isotropic", "diagonal", "kronecker")


@dataclass(frozen=True)
class TailOptions:
    """How the tail is measured and weighed."""

    kind: str
    strength: float
    num_samples: int
    draws: int
    temperature: float
    budget_bytes: int | None


class Tail:
    """No tail: what a method has for `none`, and the hooks of the others."""

    options: TailOptions
    factors: KroneckerFactors | None = None  # of the task that has just ended
    note = ""  # one line on what the task's end did

    def begin(self, task: TaskContext) -> None:
        """Before the first step of a task."""

    def add_gradients(self, task: TaskContext) -> None:
        """Add the penalty's gradient to those of the parameters in scope."""

    def end(self, task: TaskContext) -> None:
        """Take in a finished task."""

    def increase(self, task: TaskContext) -> Tensor:
        """The form (0-dim) at the parameters as they stand, of strength 1: earlier tasks' predicted increase of loss."""
        return torch.zeros(())

    def bytes(self) -> int:
        """What is kept between tasks, over all ranks."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""


class KroneckerTail(Tail):
    """strength/2 sum_t sum_l tr(G_tl D_l A_tl D_l^T): `KroneckerMemory`, filled when tasks end."""

    def __init__(self, options: TailOptions) -> None:
        self.options = options
        self.memory = KroneckerMemory(options.strength, options.budget_bytes)

    def begin(self, task: TaskContext) -> None:
        """Each task begins at the reference point; adapters merged since then count as begun anew."""
        self.factors, self.note = None, ""
        if self.memory.tasks:
            self.memory.anchor(scope_with_frozen_factors(task))

    def add_gradients(self, task: TaskContext) -> None:
        if not self.memory.tasks:
            return
        # Beside a loss in bf16 or float16, TF32 products lose nothing: they are exacter than its gradient.
        mixed = task.accelerator.mixed_precision != "no"
        with float32_products(tf32=True) if mixed else nullcontext():
            self.memory.add_gradients(scope_with_frozen_factors(task))

    def end(self, task: TaskContext) -> None:
        options, parameters = self.options, scope_with_frozen_factors(task)
        factors = self.factors = kronecker_factors(
            task.model,
            task.objective.forward_fn,
            task.samples(options.num_samples),
            parameters,
            task.accelerator,
            draws=options.draws,
            temperature=options.temperature,
            seed=task.seed,
            precision=task.curvature.precision,
        )
        update = self.memory.update(factors, parameters)
        self.note = ""
        if update.merged:
            self.note = (
                f"factors of {update.tasks} tasks are merged into one pair a layer; "
                f"adding this task's is {update.error:.1%} off"
            )

    def increase(self, task: TaskContext) -> Tensor:
        if not self.memory.tasks:
            return torch.zeros(())
        return self.memory.penalty(scope_with_frozen_factors(task)).detach() / self.options.strength

    def bytes(self) -> int:
        return world_size() * self.memory.num_bytes

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state)


class QuadraticTail(Tail):
    """strength/2 sum_i w_i (theta_i - theta*_i)^2 around the latest task's end: w the diagonal of all tasks' Fisher
    matrices, or its mean in every direction (isotropic)."""

    def __init__(self, options: TailOptions) -> None:
        self.options, self.penalty = options, QuadraticPenalty()

    def begin(self, task: TaskContext) -> None:
        if self.penalty.center is not None:
            self.penalty.set(task, self.penalty.weights)

    def add_gradients(self, task: TaskContext) -> None:
        self.penalty.add_gradients(task, self.options.strength)

    def end(self, task: TaskContext) -> None:
        batches = task.samples(self.options.num_samples)
        own = diagonal_fisher(
            task.model, task.objective.forward_fn, batches, task.parameters, task.space, seed=task.seed
        )
        weights = Block(own[None], task.space).to(training_space(task))[0]
        if self.options.kind == "isotropic":
            total = task.space.all_reduce(own.double().sum()[None])
            weights = torch.full_like(weights, float(total) / task.space.size)
        before = self.penalty.weights
        self.penalty.set(task, weights if before is None else before + weights)

    def increase(self, task: TaskContext) -> Tensor:
        return self.penalty.value(task)

    def bytes(self) -> int:
        return self.penalty.bytes(world_size())

    def state_dict(self) -> dict[str, Any]:
        return self.penalty.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.penalty.load_state_dict(state)


def make_tail(options: TailOptions) -> Tail:
    """The tail of ``options.kind``; that of ``none`` for strength 0 too."""
    if options.kind not in TAILS:
        raise UsageError(f"method.tail={options.kind}: allowed are {', '.join(TAILS)}")
    if options.kind == "none" or options.strength == 0:
        return Tail()
    return KroneckerTail(options) if options.kind == "kronecker" else QuadraticTail(options)


def scope_with_frozen_factors(task: TaskContext) -> dict[str, nn.Parameter]:
    """The parameters in scope, and each A that is frozen beside a B in scope: a layer's change needs both."""
    parameters = dict(task.parameters)
    wanted = {name.replace(".lora_B.", ".lora_A.") for name in parameters if ".lora_B." in name} - set(parameters)
    if wanted:
        backbone = inner_module(task.model).backbone
        assert isinstance(backbone, nn.Module)
        parameters.update({name: p for name, p in backbone.named_parameters() if name in wanted})
    return parameters
