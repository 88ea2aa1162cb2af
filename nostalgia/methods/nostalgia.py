"""The method: later tasks move in the complement of finished tasks' top curvature directions, and are held by a penalty
on the rest of their curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.curvature.kronecker import KroneckerFactors
from nostalgia.curvature.shares import parameter_shares
from nostalgia.data.stream import Batch
from nostalgia.errors import UsageError
from nostalgia.linalg.block import Block
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.methods.distillation import Distillation, has_earlier_heads
from nostalgia.methods.eigensolve import Eigensolver, check_eigensolve, unconverged_note
from nostalgia.methods.tail import TAILS, TailOptions, make_tail
from nostalgia.models.objective import Output
from nostalgia.options import option
from nostalgia.parallel.tensors import world_size
from nostalgia.projection import CurvatureMemory, GradientProjector, MemoryUpdate
from nostalgia.projection.memory import MERGES
from nostalgia.projection.placement import PLACEMENTS

PROJECTIONS = ("gradient", "displacement", "constrained", "soft")


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


@dataclass(frozen=True)
class NostalgiaConfig(EigenspaceConfig):
    """Options of the method."""

    project: str = option(
        "constrained",
        "What is kept out of the memory's span: gradient, displacement or constrained (the optimizer's step); soft shrinks "
        "the gradient by curvature. The gradient is projected in all but soft.",
        choices=PROJECTIONS,
    )
    metric_every: int = option(
        10,
        "Of project=constrained: steps between two looks at the optimizer's metric. Exact at any number; a look costs m^2 P.",
        low=1,
        high=10**6,
    )
    projection_start_task: int = option(2, low=1)
    tail: str = option(
        "kronecker",
        "Penalty on the rest of the spectrum, beside the projection: none, isotropic, diagonal or kronecker.",
        choices=TAILS,
    )
    tail_strength: float = option(10.0, "lam of the tail's penalty.", low=0)
    tail_samples: int = option(256, "Training images of a finished task that its tail is taken over.", low=1)
    tail_draws: int = option(4, "Output cotangents a sample, of tail=kronecker.", low=1)
    tail_temperature: float = option(1.0, "Of the output metric of tail=kronecker.", above=0)
    tail_budget_bytes: int | None = option(
        2**28,
        "Of tail=kronecker: factors on a rank, beyond which all tasks become one pair a layer; null: never.",
        low=0,
    )
    anchor: float = option(0.0, "Strength of the distillation of earlier tasks' outputs (lwf's term); 0: none.", low=0)
    anchor_temperature: float = option(2.0, "Of the distillation's softmaxes.", above=0)


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

    def end(self, task: TaskContext) -> MemoryUpdate:
        self.make(task.space, task.num_tasks)
        self.pairs = self.solver.solve(task, self.config.top_k)
        self.update = self.memory.update(self.pairs)
        return self.update

    def plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        memory = self.make(space, num_tasks)
        columns = min(memory.capacity, max(1, num_tasks) * memory.k)
        itemsize = torch.empty((), dtype=memory.dtype or space.dtype).element_size()
        placement = memory.place(space)
        copies = space.world_size if placement.replicated else 1
        text = f"at most {columns} directions of {space.size:,} numbers, {placement}"
        return MemoryPlan(columns * space.size * itemsize * copies, text)

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


class Nostalgia(Method):
    """Projects gradients and steps from task ``projection_start_task`` on (counted from 1) away from the memory; the tail of
    the spectrum, which the top eigenpairs leave out, is a penalty beside it. ``tail=none`` is the projection alone."""

    name = "nostalgia"
    Config = NostalgiaConfig
    strengths = (8, 16, 32, 64, 128, 256)
    strength_option = "top_k"

    def __init__(self, config: NostalgiaConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.eigenspace = Eigenspace(config)
        self.projector: GradientProjector | None = None
        self.tail = make_tail(
            TailOptions(
                config.tail,
                config.tail_strength,
                config.tail_samples,
                config.tail_draws,
                config.tail_temperature,
                config.tail_budget_bytes,
            )
        )
        self.all_heads = config.anchor > 0
        self.needs_metric = config.project == "constrained"
        self.distillation: Distillation | None = None
        self.num_tasks = 1
        self._fraction: Tensor | None = None

    def check(self, num_tasks: int, curvature: CurvatureOptions) -> None:
        check_eigensolve(self.config.top_k, curvature)
        start = self.config.projection_start_task
        if start > max(num_tasks, 2):
            raise UsageError(
                f"method.projection_start_task={start}, but there are {num_tasks} tasks: nothing would be projected; "
                f"allowed is 1 to {max(num_tasks, 2)}, or use method=finetune"
            )

    def begin_task(self, task: TaskContext) -> None:
        self.num_tasks = task.num_tasks
        self.eigenspace.begin(task)
        self.projector, self._fraction = None, None
        if task.index >= self.config.projection_start_task and self.eigenspace.memory.basis is not None:
            self.projector = GradientProjector(self.eigenspace.memory, task.parameters, self.config.metric_every)
        if self.tail is not None:
            self.tail.begin(task)
        self.distillation = None
        if self.all_heads and has_earlier_heads(task.model):
            self.distillation = Distillation(task, self.config.anchor_temperature, self.config.anchor)

    def loss(self, model: nn.Module, batch: Batch) -> Output:
        output = super().loss(model, batch)
        if self.distillation is not None:
            self.distillation.add(output, batch)
        return output

    def gradients(self) -> None:
        if self.tail is not None:
            self.tail.add_gradients(self.task)  # what of it lies in the memory's span is projected out with the rest
        if self.projector is not None:
            soft = self.config.project == "soft"
            self._fraction = self.projector.project_soft() if soft else self.projector.project_gradients()

    def step(self, optimizer: Optimizer) -> None:
        if self.projector is None:
            optimizer.step()
        else:
            self.projector.step(optimizer, self.config.project)

    def end_task(self, task: TaskContext) -> None:
        self.projector = self.distillation = None  # a checkpoint within the solve has no use for them
        if not task.wants_curvature:
            return
        self.eigenspace.end(task)
        if self.tail is not None:
            self.tail.end(task)

    def metrics(self) -> dict[str, float]:
        if self.projector is None:
            return {}
        found = {} if self._fraction is None else {"projected_fraction": float(self._fraction)}
        leak = self.projector.leak()
        return found if leak is None else {**found, "leak": leak}

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        return self.eigenspace.plan(space, num_tasks)

    def bytes_remembered(self) -> int:
        return self.eigenspace.bytes_remembered() + (0 if self.tail is None else self.tail.bytes())

    def replicated_tensors(self) -> dict[str, Tensor]:
        memory = self.eigenspace.made
        if memory is None or memory.basis is None or memory.space is None or memory.space.placement != "local":
            return {}
        return {"the memory's basis": memory.basis}

    def eigenpairs(self) -> Eigenpairs | None:
        return self.eigenspace.pairs

    def factors(self) -> KroneckerFactors | None:
        return None if self.tail is None else self.tail.factors

    def report(self) -> dict[str, Any]:
        return self.eigenspace.report()

    def note(self) -> str:
        notes = (self.eigenspace.note(), "" if self.tail is None else self.tail.note)
        return "; ".join(note for note in notes if note)

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.eigenspace.state_dict(self.task),
            "num_tasks": self.num_tasks,
            "projector": None if self.projector is None else self.projector.state(),
            "tail": None if self.tail is None else self.tail.state_dict(),
            "teacher": None if self.distillation is None else self.distillation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_tasks = state["num_tasks"]
        self.eigenspace.load_state_dict(state, self.num_tasks)
        if self.projector is not None and state["projector"] is not None:
            self.projector.load_state(state["projector"])
        if self.tail is not None and state["tail"] is not None:
            self.tail.load_state_dict(state["tail"])
        if self.distillation is not None and state["teacher"] is not None:
            self.distillation.load_state_dict(state["teacher"])
