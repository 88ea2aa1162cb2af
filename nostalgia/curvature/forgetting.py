"""Predicted forgetting: the second-order increase of finished tasks' loss, to compare with the measured one.

With a the parameters a task ended with, g and H its gradient and curvature there, d = theta - a the displacement since,
q_i and lambda_i the k eigenpairs that were found, d_out the part of d outside their span, and P parameters:

    increase ~ g.d + 1/2 sum_i lambda_i (q_i.d)^2 + 1/2 (tr H - sum_i lambda_i) / (P - k) |d_out|^2

The last term takes the rest of the spectrum as equal in all directions; whatever that spectrum is, the rest cannot add
more than 1/2 lambda_k |d_out|^2, the *bound* (with a pair that did not converge, and so is part of the rest, its upper
limit where that is larger). A step that the method has projected has q_i.d = 0: only g.d and the rest
are left.

With Kronecker factors of the task's curvature, which hold all of its spectrum in weight space, the rest is theirs:

    increase ~ g.d + 1/2 sum_l tr(G_l D_l A_l D_l^T),   D_l the change of layer l's weight

All of it is second order around a: far from it the numbers say how far the theory carries, not more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nostalgia.curvature.base import BatchedOperator
from nostalgia.curvature.kronecker import KroneckerFactors
from nostalgia.curvature.trace import trace_outside
from nostalgia.errors import RunFailedError
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.vector_space import VectorSpace

DEFINITIONS = {
    "measured": "mean loss on the task's curvature samples now, minus that at the end of the task",
    "predicted": "linear + inside + outside; with Kronecker factors linear + kronecker",
    "linear": "g.d, with d the displacement of the projected parameters since the end of the task",
    "inside": "1/2 sum_i lambda_i (q_i.d)^2 over the task's converged eigenpairs",
    "outside": "1/2 (tr H - sum_i lambda_i) / (P - k) |d_out|^2, with d_out the part of d outside their span",
    "kronecker": "1/2 sum_l tr(G_l D_l A_l D_l^T), with D_l the change of layer l's weight and the task's Kronecker factors",
    "exact": "1/2 d.Cd by one product of the task's curvature C (curvature.kind) at its end, over its curvature samples: what "
    "its parts above leave out, such as the coupling of layers (analysis.exact_second_order)",
    "explained": "sum of predicted over sum of measured, over all rows",
    "within_factor_1.5": "share of the rows whose predicted increase is between measured / 1.5 and 1.5 measured",
    "explained_exactly, exactly_within_factor_1.5": "the same of linear + exact",
    "bound": "1/2 lambda_k |d_out|^2: the most the outside can add while second order holds; a pair that did not "
    "converge is outside, and stands in for lambda_k where it is larger",
}


@dataclass(frozen=True)
class Expansion:
    """What is known of a finished task's loss around the parameters it ended with."""

    task: str
    loss: float  # mean, over its curvature set
    eigenvalues: list[float]  # (k,) of the pairs that converged
    kept: list[int]  # (k,) their rows in the task's basis
    rest: float  # trace of the curvature outside their span
    rest_error: float | None  # its standard error; None for one probe
    gradient_norm: float
    unconverged: float = 0.0  # upper limit of the eigenvalues that did not converge, which lie outside; 0.0 for none

    @property
    def trace(self) -> float:
        return sum(self.eigenvalues) + self.rest

    @property
    def smallest(self) -> float:
        """Largest curvature the directions outside can have: lambda_k or one left out, not below zero."""
        return max(min(self.eigenvalues, default=0.0), self.unconverged, 0.0)


@dataclass(frozen=True)
class ForgettingRow:
    """One finished task after a later one; losses in nats a sample, the terms as in `DEFINITIONS`."""

    task: str
    after: str
    measured: float
    predicted: float
    linear: float
    inside: float
    outside: float
    bound: float
    displacement: float  # |d|
    displacement_outside: float  # |d_out|
    kronecker: float | None = None  # None: without factors
    exact: float | None = None  # None: not asked for


class ForgettingPrediction:
    """Keeps an expansion of each finished task's loss, and holds it against what later tasks did to it.

    ``bases`` maps tasks to their eigenvectors (k, P_local), ``factors`` to their Kronecker factors: a task given to
    `finish` has one of them at least; factors are those of the loss (temperature 1). Both are shared with the caller, not
    copied. Of each task two vectors (P_local,) more are kept, in ``vectors``. All ranks call every method together; numbers
    are the same on all of them.
    """

    def __init__(
        self,
        space: VectorSpace,
        bases: Mapping[str, Tensor],
        factors: Mapping[str, KroneckerFactors] = MappingProxyType({}),
        vectors: MutableMapping[str, Tensor] | None = None,
        *,
        trace_samples: int = 8,
        seed: int = 0,
    ) -> None:
        self.space, self.bases, self.factors = space, bases, factors
        self.trace_samples, self.seed = trace_samples, seed
        self.expansions: dict[str, Expansion] = {}
        self.rows: list[ForgettingRow] = []
        self.vectors = {} if vectors is None else vectors  # task -> its parameters and its gradient (2, P_local)

    @torch.no_grad()
    def finish(
        self, task: str, operator: BatchedOperator, pairs: Eigenpairs | None, loss: float | None = None
    ) -> Expansion:
        """Expand the loss of a task that ended at the operator's parameters: a gradient and, where neither Kronecker factors
        nor ``pairs`` say the trace, ``trace_samples`` products.

        ``loss`` is the mean loss there (default the operator's own): give what `measure` will compare it with.
        """
        gradient = operator.gradient()
        values, kept, limits = torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0)
        if pairs is not None:
            converged = pairs.converged.cpu()
            kept = converged.nonzero().flatten()
            values = pairs.eigenvalues.cpu()[kept]
            limits = (pairs.eigenvalues + pairs.residuals).cpu()[~converged]
        rest, error = 0.0, None
        if task in self.factors:
            rest = self.factors[task].trace() - float(values.sum())
        elif pairs is not None and pairs.trace is not None:
            rest = pairs.trace - float(values.sum())
        elif pairs is not None:
            rest, error = trace_outside(operator, pairs.eigenvectors, kept, self.trace_samples, self.seed)
        if not math.isfinite(rest):
            raise RunFailedError(f"{task}: the trace of the curvature is {rest}; try curvature.precision=float64")
        expansion = Expansion(
            task=task,
            loss=operator.loss() if loss is None else loss,
            eigenvalues=values.tolist(),
            kept=kept.tolist(),
            rest=rest,
            rest_error=error,
            gradient_norm=float(self.space.norm(gradient)),
            unconverged=max(limits.tolist(), default=0.0),
        )
        parameters = self.space.take(p.detach() for p in operator.parameters.values())
        self.vectors[task] = torch.stack([parameters, gradient])
        self.expansions[task] = expansion
        return expansion

    @torch.no_grad()
    def measure(
        self,
        after: str,
        theta: Tensor,
        loss_of: Callable[[str], float],
        form_of: Callable[[str, Tensor, Tensor], float | None] | None = None,
    ) -> list[ForgettingRow]:
        """A row for each task finished before ``after``, at the parameters theta (P_local,) it ended with.

        ``loss_of`` gives a task's mean loss over its curvature set at those parameters; ``form_of``, of a task, its end
        (P_local,) and d (P_local,), d.Cd with its curvature C there, None where that cannot be had.
        """
        rows = []
        for task in [task for task in self.expansions if task != after]:
            row = self.predict(task, after, theta, loss_of(task))
            if form_of is not None:
                anchor = self.vectors[task][0]
                form = form_of(task, anchor, theta - anchor)
                row = replace(row, exact=None if form is None else 0.5 * form)
            rows.append(row)
        self.rows = [row for row in self.rows if row.after != after] + rows
        return rows

    @torch.no_grad()
    def predict(self, task: str, after: str, theta: Tensor, loss: float) -> ForgettingRow:
        """The row of one finished task at theta (P_local,), where its mean loss is ``loss``: one small all-reduce."""
        expansion = self.expansions[task]
        anchor, gradient = self.vectors[task]
        d = theta - anchor
        products = self.space.gram(torch.stack([d, gradient]), d[None], exact=True)[:, 0].cpu()
        squares = torch.zeros(0, dtype=torch.float64)
        if expansion.kept:
            found = self.space.gram(self.bases[task], d[None], exact=True)[:, 0].cpu()
            squares = found[expansion.kept].square()
        outside_squared = max(float(products[0] - squares.sum()), 0.0)
        rest = self.space.size - len(expansion.kept)
        inside = 0.5 * float(torch.tensor(expansion.eigenvalues, dtype=torch.float64) @ squares)
        kronecker, outside = None, 0.0
        if task in self.factors:
            kronecker = self.factors[task].increase(self._whole(anchor), self._whole(theta))
        elif rest:
            outside = 0.5 * expansion.rest / rest * outside_squared
        linear = float(products[1])
        return ForgettingRow(
            task=task,
            after=after,
            measured=loss - expansion.loss,
            predicted=linear + (inside + outside if kronecker is None else kronecker),
            linear=linear,
            inside=inside,
            outside=outside,
            bound=0.5 * expansion.smallest * outside_squared,
            displacement=float(products[0].clamp_min(0.0).sqrt()),
            displacement_outside=outside_squared**0.5,
            kronecker=kronecker,
        )

    def _whole(self, vector: Tensor) -> dict[str, Tensor]:
        """Parameters by name, whole on every rank, of a vector (P_local,)."""
        return dict(zip(self.space.names, self.space.gather(vector), strict=True))

    def report(self) -> dict[str, Any]:
        """All that was found, for results/forgetting_prediction.json."""
        return {
            "definitions": DEFINITIONS,
            "parameters": self.space.size,
            "trace_samples": self.trace_samples,
            **self._accuracy(),
            "tasks": [
                {
                    "task": e.task,
                    "loss": e.loss,
                    "gradient_norm": e.gradient_norm,
                    "eigenpairs": len(e.kept),
                    "eigenvalue_k": min(e.eigenvalues, default=None),
                    "trace": e.trace,
                    "trace_error": e.rest_error,
                    "trace_outside": e.rest,
                }
                for e in self.expansions.values()
            ],
            "rows": [asdict(row) for row in self.rows],
        }

    def _accuracy(self) -> dict[str, float]:
        """How much of what was measured second order explains."""
        exact = [(row.measured, row.linear + row.exact) for row in self.rows if row.exact is not None]
        return {
            **_accuracy([(row.measured, row.predicted) for row in self.rows], "explained", "within_factor_1.5"),
            **_accuracy(exact, "explained_exactly", "exactly_within_factor_1.5"),
        }

    # -- to stop and go on -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything but `vectors`, as JSON takes it."""
        return {
            "expansions": [asdict(e) for e in self.expansions.values()],
            "rows": [asdict(row) for row in self.rows],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave; the vectors are given back beside it."""
        expansions = [Expansion(**_known(Expansion, item)) for item in state["expansions"]]
        self.expansions = {e.task: e for e in expansions}
        self.rows = [ForgettingRow(**_known(ForgettingRow, item)) for item in state["rows"]]


def _accuracy(pairs: Sequence[tuple[float, float]], explained: str, within: str) -> dict[str, float]:
    """Of pairs measured, predicted: sum of predicted over sum of measured, and the share within a factor of 1.5."""
    measured = sum(m for m, _ in pairs)
    if measured == 0:
        return {}
    close = [m != 0 and 1 / 1.5 <= predicted / m <= 1.5 for m, predicted in pairs]
    return {explained: sum(predicted for _, predicted in pairs) / measured, within: sum(close) / len(close)}


def _known(kind: Any, item: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass in ``item``: a newer version may have written more."""
    return {f.name: item[f.name] for f in fields(kind)}
