"""The method: later tasks move in the complement of finished tasks' top curvature directions, and are held by a penalty
on the rest of their curvature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.curvature.kronecker import KroneckerFactors
from nostalgia.data.stream import Batch
from nostalgia.errors import UsageError
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.methods.distillation import Distillation
from nostalgia.methods.eigensolve import check_eigensolve
from nostalgia.methods.eigenspace import Eigenspace, EigenspaceConfig
from nostalgia.methods.path import PATH_HELP, PathStep, check_path
from nostalgia.methods.tail import TAILS, KroneckerTail, QuadraticTail, TailOptions, make_tail
from nostalgia.models.objective import Output
from nostalgia.options import option
from nostalgia.projection import GradientProjector

PROJECTIONS = ("gradient", "displacement", "constrained", "soft")


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
    tail_temperature: float = option(4.0, "Of the output metric of tail=kronecker.", above=0)
    tail_budget_bytes: int | None = option(
        2**28,
        "Of tail=kronecker: factors on a rank, beyond which all tasks become one pair a layer; null: never.",
        low=0,
    )
    anchor: float = option(0.0, "Strength of the distillation of earlier tasks' outputs (lwf's term); 0: none.", low=0)
    anchor_temperature: float = option(2.0, "Of the distillation's softmaxes.", above=0)
    path: float | str = option(1.0, PATH_HELP, above=0, high=1)


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
                kind=config.tail,
                strength=config.tail_strength,
                num_samples=config.tail_samples,
                draws=config.tail_draws,
                temperature=config.tail_temperature,
                budget_bytes=config.tail_budget_bytes,
            )
        )
        self.path = PathStep(config.path)
        self.all_heads = config.anchor > 0
        self.needs_metric = config.project == "constrained"
        self.prefers_merged_adapters = isinstance(self.tail, KroneckerTail)
        self.keeps_positions = isinstance(self.tail, QuadraticTail)
        self.distillation = Distillation(config.anchor, config.anchor_temperature)
        self.num_tasks = 1
        self._fraction: Tensor | None = None

    def check(self, num_tasks: int, curvature: CurvatureOptions) -> None:
        check_eigensolve(self.config.top_k, curvature)
        check_path(self.config.path, self.tail)
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
        self.tail.begin(task)
        self.path.begin(task)
        self.distillation.begin(task)

    def loss(self, model: nn.Module, batch: Batch) -> Output:
        output = super().loss(model, batch)
        self.distillation.add(output, batch)
        return output

    def gradients(self) -> None:
        self.tail.add_gradients(self.task)  # what of it lies in the memory's span is projected out with the rest
        if self.projector is not None:
            soft = self.config.project == "soft"
            self._fraction = self.projector.project_soft() if soft else self.projector.project_gradients()

    def step(self, optimizer: Optimizer) -> None:
        if self.projector is not None and self.config.project == "constrained":
            self.projector.constrain_step(optimizer)
        elif self.projector is not None and self.config.project == "displacement":
            self.projector.displace_step(optimizer)
        else:
            optimizer.step()

    def end_task(self, task: TaskContext) -> None:
        self.projector = None  # a checkpoint within the solve has no use for it
        self.distillation.end()
        self.path.end(task, self.config.tail_samples, self.tail)
        if not task.wants_curvature:
            return
        self.eigenspace.end(task)
        self.tail.end(task)

    def metrics(self) -> dict[str, float]:
        if self.projector is None:
            return {}
        found = {} if self._fraction is None else {"projected_fraction": float(self._fraction)}
        leak = self.projector.leak()
        return found if leak is None else {**found, "leak": leak}

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        return self.eigenspace.memory_plan(space, num_tasks)

    def bytes_remembered(self) -> int:
        return self.eigenspace.bytes_remembered() + self.tail.bytes()

    def replicated_tensors(self) -> dict[str, Tensor]:
        return self.eigenspace.replicated_tensors()

    def eigenpairs(self) -> Eigenpairs | None:
        return self.eigenspace.pairs

    def factors(self) -> KroneckerFactors | None:
        return self.tail.factors

    def report(self) -> dict[str, Any]:
        return self.eigenspace.report()

    def note(self) -> str:
        notes = (self.path.note, self.eigenspace.note(), self.tail.note)
        return "; ".join(note for note in notes if note)

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.eigenspace.state_dict(self.task),
            "num_tasks": self.num_tasks,
            "projector": None if self.projector is None else self.projector.state(),
            "tail": self.tail.state_dict(),
            "path": self.path.state_dict(),
            "teacher": self.distillation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_tasks = state["num_tasks"]
        self.eigenspace.load_state_dict(state, self.num_tasks)
        if self.projector is not None and state["projector"] is not None:
            self.projector.load_state(state["projector"])
        self.tail.load_state_dict(state["tail"])
        self.path.load_state_dict(state["path"])
        self.distillation.load_state_dict(state["teacher"])
