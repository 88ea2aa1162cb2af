"""What a finished task leaves behind: the top eigenpairs of its loss, at the parameters it ended with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn

from nostalgia.curvature.operators import BatchedOperator, GGNOperator, HessianOperator
from nostalgia.curvature.rows import GradientRows
from nostalgia.data.stream import Batch
from nostalgia.errors import UsageError
from nostalgia.linalg.krylov import Operator
from nostalgia.linalg.lanczos import Eigenpairs, LanczosProgress, LanczosState, lanczos
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.models.objective import Objective


@dataclass(frozen=True, kw_only=True)
class CurvatureOptions:
    """How a finished task's curvature is measured; names as in the configuration's ``curvature`` section."""

    kind: str = "ggn"
    solver: str = "auto"
    rows_per_sample: int = 2
    rows_budget_bytes: int = 2**32
    last_task: bool = False
    hvp: str = "exact"
    num_samples: int = 512
    batch_size: int = 64
    precision: str = "float32"
    retain_graph: str | bool = "auto"
    compile: bool = False
    tol: float = 1e-2
    max_products: int | None = None
    max_basis: int | None = None
    seed: int = 0

    def takes_rows(self, space: VectorSpace) -> bool:
        """Whether top eigenpairs over ``space`` come from rows; of ``auto`` the same for any number of ranks and any task."""
        if self.solver != "auto":
            return self.solver == "rows"
        held = self.num_samples * self.rows_per_sample * space.size * space.dtype.itemsize
        return self.kind == "ggn" and held <= self.rows_budget_bytes


def task_operator(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    parameters: Mapping[str, nn.Parameter],
    accelerator: Accelerator,
    options: CurvatureOptions,
    space: VectorSpace | None = None,
) -> BatchedOperator:
    """The curvature of a task's mean loss over its curvature set; ``batches`` are this rank's share."""
    common: dict[str, Any] = {
        "method": options.hvp,
        "precision": options.precision,
        "retain_graph": options.retain_graph,
        "compile": options.compile,
        "space": space,
    }
    if options.kind == "hessian":
        return HessianOperator(model, objective.loss_fn, batches, parameters, accelerator, **common)
    if options.kind == "ggn":
        common["label_smoothing"] = objective.label_smoothing
        return GGNOperator(model, objective.forward_fn, batches, parameters, accelerator, **common)
    raise UsageError(f"curvature.kind={options.kind!r}: allowed are hessian, ggn")


def gradient_rows(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    parameters: Mapping[str, nn.Parameter],
    accelerator: Accelerator,
    options: CurvatureOptions,
    space: VectorSpace | None = None,
) -> GradientRows:
    """The gradients whose squares sum to a task's Gauss-Newton matrix; ``batches`` are this rank's share."""
    return GradientRows(
        model,
        objective.forward_fn,
        batches,
        parameters,
        accelerator,
        draws=options.rows_per_sample,
        seed=options.seed,
        precision=options.precision,
        piece_bytes=min(2**27, options.rows_budget_bytes),
        space=space,
    )


def top_eigenpairs(
    operator: Operator,
    k: int,
    options: CurvatureOptions,
    callback: Callable[[LanczosProgress], None] | None = None,
    state: LanczosState | None = None,
) -> Eigenpairs:
    """The ``k`` largest eigenpairs, solved as ``options`` say; `lanczos` says the rest."""
    return lanczos(
        operator,
        k,
        tol=options.tol,
        max_products=options.max_products,
        max_basis=options.max_basis,
        seed=options.seed,
        callback=callback,
        state=state,
    )
