"""What a finished task leaves behind: the top eigenpairs of its loss, at the parameters it ended with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from nostalgia.curvature.operators import BatchedOperator, GGNOperator, HessianOperator
from nostalgia.data.stream import Batch
from nostalgia.errors import UsageError
from nostalgia.linalg.lanczos import Eigenpairs, LanczosProgress, LanczosState, lanczos
from nostalgia.linalg.vector_space import VectorSpace

LossFn = Callable[[nn.Module, Batch], tuple[Tensor, int]]


@dataclass(frozen=True, kw_only=True)
class CurvatureOptions:
    """How a finished task's eigenpairs are computed; names as in the configuration's ``nostalgia`` group."""

    top_k: int
    kind: str = "hessian"
    method: str = "exact"
    precision: str = "float32"
    retain_graph: str | bool = "auto"
    compile: bool = False
    tol: float = 1e-2
    max_products: int | None = None
    max_basis: int | None = None
    seed: int = 0
    label_smoothing: float = 0.0  # of the loss whose Gauss-Newton matrix is taken; a Hessian's loss_fn has its own


def task_operator(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    parameters: Mapping[str, nn.Parameter],
    accelerator: Accelerator,
    options: CurvatureOptions,
    space: VectorSpace | None = None,
) -> BatchedOperator:
    """The curvature of a task's mean loss over its curvature set; ``batches`` are this rank's share."""
    common: dict[str, Any] = {
        "method": options.method,
        "precision": options.precision,
        "retain_graph": options.retain_graph,
        "compile": options.compile,
        "space": space,
    }
    if options.kind == "hessian":
        return HessianOperator(model, loss_fn, batches, parameters, accelerator, **common)
    if options.kind == "ggn":
        common["label_smoothing"] = options.label_smoothing
        return GGNOperator(model, _logits, batches, parameters, accelerator, loss="cross_entropy", **common)
    raise UsageError(f"nostalgia.curvature={options.kind!r}: allowed are hessian, ggn")


def top_eigenpairs(
    operator: BatchedOperator,
    options: CurvatureOptions,
    callback: Callable[[LanczosProgress], None] | None = None,
    state: LanczosState | None = None,
) -> Eigenpairs:
    return lanczos(
        operator,
        options.top_k,
        tol=options.tol,
        max_products=options.max_products,
        max_basis=options.max_basis,
        seed=options.seed,
        callback=callback,
        state=state,
    )


def _logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The one head's logits and the labels: curvature sets hold no padding."""
    (logits,) = model(batch.images)
    return logits, batch.labels
