"""The multipliers that keep a step in the complement of Q: S c = Q d with S = Q D^-1 Q^T.

Any positive D gives a step with Q d = 0, so the metric D and the factor of S may stand still for a number of steps: the
m^2 P work of S is done once in so many, and a step in between reads Q twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.block import Block
from nostalgia.projection.rows import BasisRows


class StepConstraint:
    """Solves for the correction D^-1 Q^T S^-1 Q d of displacements d, with D renewed every ``every`` steps.

    ``inverse_gram`` (m, m): (Q Q^T)^-1 where the rows are not orthonormal, else None.
    """

    def __init__(self, rows: BasisRows, inverse_gram: Tensor | None, every: int) -> None:
        if every < 1:
            raise UsageError(f"metric_every={every}: allowed is 1 or more")
        self.rows, self.inverse_gram, self.every = rows, inverse_gram, every
        self.steps = 0  # taken so far
        self.inverse_metric: Tensor | None = None  # (1, P_local); None: the identity
        self.factor: Tensor | None = (
            None  # (m, m) float64, lower Cholesky factor of S; None: the metric is the identity
        )

    def renew(self, metric: Callable[[], Tensor | None]) -> None:
        """Count a step; take over what ``metric`` says, 1 / D (P_local,) or None for the identity, where it is due."""
        if self.steps % self.every == 0:
            inverse = metric()
            self.inverse_metric = None if inverse is None else inverse[None]
            self.factor = None if inverse is None else self._factor(inverse)
        self.steps += 1

    def correction(self, displacement: Tensor) -> Tensor:
        """D^-1 Q^T S^-1 Q d (P_local,), what to subtract from ``displacement`` d (P_local,): reads Q twice."""
        coefficients, _ = self.rows.coefficients(displacement)
        if self.factor is None or self.inverse_metric is None:
            return self.rows.combination(solve_gram(self.inverse_gram, coefficients))
        multipliers = torch.cholesky_solve(coefficients[:, None], self.factor)[:, 0]
        return self.rows.combination(multipliers).mul_(self.inverse_metric[0])

    def state(self) -> dict[str, Any]:
        metric = None if self.inverse_metric is None else Block(self.inverse_metric, self.rows.space)
        return {"steps": self.steps, "inverse_metric": metric, "factor": self.factor}

    def load_state(self, state: Mapping[str, Any]) -> None:
        metric: Block | None = state["inverse_metric"]
        self.steps, self.factor = state["steps"], state["factor"]
        self.inverse_metric = None if metric is None else metric.to(self.rows.space).contiguous()

    def _factor(self, inverse_metric: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(self.rows.weighted_gram(inverse_metric))
        if int(failed):
            raise RunFailedError(
                f"the constrained step's system of {len(self.rows)} directions is not positive definite: the parameters or "
                "the optimizer's state are not finite; lower train.lr, or use train.precision=32 or bf16"
            )
        return factor


def solve_gram(inverse_gram: Tensor | None, coefficients: Tensor) -> Tensor:
    """(Q Q^T)^-1 times ``coefficients`` (m,)."""
    return coefficients if inverse_gram is None else inverse_gram @ coefficients
