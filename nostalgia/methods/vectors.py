"""Flat vectors over the parameters in scope, as a training step needs them, and quadratic penalties on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nostalgia.linalg.block import Block
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, TaskContext
from nostalgia.parallel.tensors import local, world_size


def training_space(task: TaskContext) -> VectorSpace:
    """The space in which vectors meet parameters without communication: whole under DDP, shards under FSDP2."""
    return task.space.replicated() if task.space.placement == "sliced" else task.space


def gradients_of(task: TaskContext) -> list[Tensor]:
    """The gradients of the parameters in scope, in order; zeros are put in where there is none."""
    for parameter in task.parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [p.grad for p in task.parameters.values() if p.grad is not None]


def vectors_memory_plan(space: VectorSpace, count: int) -> MemoryPlan:
    """Of a method that keeps ``count`` vectors of the `training_space`, where ``space`` is the run's."""
    copies = 1 if space.placement == "sharded" else world_size()
    what = "a vector" if count == 1 else f"{count} vectors"
    return MemoryPlan(count * space.size * space.dtype.itemsize * copies, f"{what} of {space.size:,} numbers")


@torch.no_grad()
def add_to(tensors: Iterable[Tensor], vector: Tensor) -> None:
    """Add a vector (L,) of `training_space` to parameter-shaped tensors, whole or shards, in place."""
    mine = [local(tensor) for tensor in tensors]
    parts = vector.split([t.numel() for t in mine])
    torch._foreach_add_(mine, [part.view(t.shape).to(t.dtype) for part, t in zip(parts, mine, strict=True)])


class QuadraticPenalty:
    """strength/2 sum_i w_i (theta_i - c_i)^2 over the parameters in scope; nothing until it is given a center.

    Sums of such terms are one: `include` adds weights, and moves the center to their weighted mean, which gives the same
    gradient. Two vectors of P numbers, one where all weights are 1.
    """

    def __init__(self) -> None:
        self.center: Tensor | None = None  # (L,) in the training space
        self.weights: Tensor | None = None  # (L,); None: all 1
        self.space: VectorSpace | None = None

    @torch.no_grad()
    def set(self, task: TaskContext, weights: Tensor | None) -> None:
        """Let the center be the parameters as they are now; ``weights`` (L,) in the training space."""
        self.space = training_space(task)
        self.center = self.space.take(p.detach() for p in task.parameters.values())
        self.weights = weights

    @torch.no_grad()
    def include(self, task: TaskContext, weights: Tensor) -> None:
        """Add a term with ``weights`` (L,) around the parameters as they are now."""
        before, center = self.weights, self.center
        self.set(task, weights)
        if before is not None and center is not None and self.center is not None:
            total = before + weights
            share = torch.where(total > 0, weights / total.clamp_min(torch.finfo(total.dtype).tiny), 1.0)
            self.center = center + share * (self.center - center)
            self.weights = total

    @torch.no_grad()
    def add_gradients(self, task: TaskContext, strength: float) -> None:
        """Add strength w (theta - c) to the gradients; strength 0 leaves them untouched."""
        if self.center is None or strength == 0:
            return
        assert self.space is not None
        change = self.space.take(p.detach() for p in task.parameters.values()).sub_(self.center)
        if self.weights is not None:
            change.mul_(self.weights)
        add_to(gradients_of(task), change.mul_(strength))

    @torch.no_grad()
    def value(self, task: TaskContext) -> Tensor:
        """Of strength 1 (0-dim), where parameters are whole on every rank; 0 without a center."""
        if self.center is None:
            return torch.zeros(())
        assert self.space is not None
        rows = [self.center] if self.weights is None else [self.center, self.weights]
        center, *weights = Block(torch.stack(rows), self.space).to(task.space)
        square = task.space.take(p.detach() for p in task.parameters.values()).sub_(center).square_()
        own = square.mul_(weights[0]) if weights else square
        return 0.5 * task.space.all_reduce(own.double().sum()[None])[0]

    def bytes(self, world_size: int) -> int:
        """Over all ranks."""
        if self.center is None or self.space is None:
            return 0
        copies = world_size if self.space.placement == "local" else 1
        vectors = 1 if self.weights is None else 2
        return vectors * self.space.size * self.center.element_size() * copies

    def state_dict(self) -> dict[str, Any]:
        if self.center is None or self.space is None:
            return {}
        rows = [self.center] if self.weights is None else [self.center, self.weights]
        if getattr(self, "_saved_of", None) is not self.center:  # the same block again while nothing has changed
            self._saved, self._saved_of = torch.stack(rows), self.center
        return {"penalty": Block(self._saved, self.space)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "penalty" not in state:
            self.center = self.weights = self.space = None
            return
        block: Block = state["penalty"]
        self.space = block.space.replicated() if block.space.placement == "sliced" else block.space
        rows = block.to(self.space)
        self.center, self.weights = rows[0].clone(), rows[1].clone() if len(rows) > 1 else None
