"""Top eigenspaces of finished tasks: the options, the memory and the solver of methods that keep them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nostalgia.curvature.shares import parameter_shares
from nostalgia.errors import UsageError
from nostalgia.linalg.block import Block
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, TaskContext
from nostalgia.methods.eigensolve import Eigensolver, unconverged_note
from nostalgia.options import option
from nostalgia.parallel.tensors import world_size
from nostalgia.projection import CurvatureMemory, MemoryUpdate
from nostalgia.projection.memory import MERGES
from nostalgia.projection.placement import PLACEMENTS


@dataclass(frozen=True)
class EigenspaceConfig:
    """Options of methods that keep top eigenspaces."""

    top_k: int = option(32, "Eigenpairs taken of each finished task.", low=1)
    k_max: int | None = option(None, "Directions the union memory holds at most; null: 4 top_k.", low=1)
    merge: str = option(
        "union", "union of all tasks' spaces, their running mean, or a moving mean (ema).", choices=MERGES
    )
    ema_share: float = option(0.5, "Of merge=ema: the share of the latest task.", above=0, high=1)
    basis_placement: str = option(
        "auto",
        "Under DDP: replicated (no collective of size P a step), sharded (1/W of the memory), auto by the budget.",
        choices=PLACEMENTS,
        free=True,
    )
    basis_dtype: str = option("float32", choices=("float32", "bfloat16"))
    basis_memory_gb: float | None = option(
        None, "Budget of auto, per rank; null: a tenth of the device's memory.", low=0, free=True
    )

    def __post_init__(self) -> None:
        if self.k_max is not None and self.k_max < self.top_k:
            raise UsageError(f"method.k_max={self.k_max} is below method.top_k={self.top_k}; raise it or leave it null")
        if self.merge != "union" and self.k_max is not None:
            raise UsageError(
                f"method.k_max={self.k_max} bounds method.merge=union; {self.merge} holds top_k = {self.top_k} "
                "directions: leave k_max null, or choose union"
            )


class Eigenspace:
    """The memory of a method that keeps eigenspaces, with the solver that fills it."""

    def __init__(self, config: EigenspaceConfig) -> None:
        self.config = config
        self.solver = Eigensolver()
        self.made: CurvatureMemory | None = None
        self.pairs: Eigenpairs | None = None
        self.update: MemoryUpdate | None = None

    def begin(self, task: TaskContext) -> None:
        self.make(task.space, task.num_tasks)
        self.pairs = self.update = None

    def make(self, space: VectorSpace, num_tasks: int) -> CurvatureMemory:
        """The memory, made when the number of tasks is known; raises UsageError for more directions than parameters."""
        options = self.config
        if self.made is None:
            if options.top_k > space.size:
                raise UsageError(
                    f"method.top_k={options.top_k}: allowed 1 to {space.size}, the number of parameters in scope"
                )
            k_max = 4 * options.top_k if options.k_max is None else options.k_max
            self.made = CurvatureMemory(
                options.top_k,
                options.merge,
                min(k_max, max(1, num_tasks) * options.top_k),  # so that `auto` counts no columns that never come
                placement=options.basis_placement,
                dtype=torch.bfloat16 if options.basis_dtype == "bfloat16" else None,
                budget_bytes=None if options.basis_memory_gb is None else options.basis_memory_gb * 2**30,
                ema_share=options.ema_share,
            )
        return self.made

    @property
    def memory(self) -> CurvatureMemory:
        """The memory, once the first task has begun or a state was taken up."""
        assert self.made is not None
        return self.made

    def replicated_tensors(self) -> dict[str, Tensor]:
        """The basis, where every rank has all of it."""
        memory = self.made
        if memory is None or memory.basis is None or memory.space is None or memory.space.placement != "local":
            return {}
        return {"the memory's basis": memory.basis}

    def end(self, task: TaskContext) -> MemoryUpdate:
        self.make(task.space, task.num_tasks)
        self.pairs = self.solver.solve(task, self.config.top_k)
        self.update = self.memory.update(self.pairs)
        return self.update

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        memory = self.make(space, num_tasks)
        columns = min(memory.capacity, max(1, num_tasks) * memory.k)
        itemsize = torch.empty((), dtype=memory.dtype or space.dtype).element_size()
        placement = memory.place(space)
        copies = space.world_size if placement.replicated else 1
        text = f"at most {columns} directions of {space.size:,} numbers, {placement}"
        return MemoryPlan(columns * (space.size * itemsize * copies + 8), text)  # with an eigenvalue each

    def report(self) -> dict[str, Any]:
        """For the task's curvature file; a collective."""
        memory = self.memory
        found: dict[str, Any] = {
            "memory_eigenvalues": memory.eigenvalues.tolist(),
            "memory_dropped": 0 if self.update is None else self.update.dropped,
            "memory_basis": memory.describe(),
        }
        if memory.basis is not None and memory.space is not None:
            found["memory_importance"] = parameter_shares(memory.basis, memory.eigenvalues, memory.space)
        return found

    def note(self) -> str:
        if self.pairs is None or self.update is None:
            return ""
        notes = [unconverged_note(self.pairs)]
        if self.update.dropped:
            notes.append(
                f"the memory is full ({self.memory.capacity} directions): {self.update.dropped} dropped, the largest with "
                f"eigenvalue {self.update.dropped_eigenvalue:.3g}"
            )
        return "; ".join(note for note in notes if note)

    def bytes_remembered(self) -> int:
        memory = self.made
        if memory is None or memory.basis is None or memory.space is None:
            return 0
        whole = memory.columns * memory.space.size * memory.basis.element_size()
        copies = world_size() if memory.space.placement == "local" else 1
        return whole * copies + memory.eigenvalues.numel() * 8

    def state_dict(self, task: TaskContext | None) -> dict[str, Any]:
        memory = self.made
        kept: dict[str, Any] | None = None
        if memory is not None and memory.basis is not None and memory.space is not None:
            kept = {"basis": Block(memory.basis, memory.space), "eigenvalues": memory.eigenvalues}
        tasks = 0 if memory is None else memory.tasks
        return {"memory": kept, "tasks": tasks, "solve": self.solver.state_dict(task)}

    def load_state_dict(self, state: Mapping[str, Any], num_tasks: int) -> None:
        self.solver.load_state_dict(state["solve"])
        kept, tasks = state["memory"], state["tasks"]
        if kept is not None and (self.made is None or self.made.tasks != tasks):
            block: Block = kept["basis"]
            memory = self.make(block.space, num_tasks)
            memory.load(block.rows, kept["eigenvalues"].double().cpu(), tasks, block.space)
