"""Hessian products by central differences of two gradients, for models too large to gather or differentiate twice.

    H v ~ |v| ( g(theta + h u) - g(theta - h u) ) / (2 h),   u = v / |v|

The error is of order h^2 from the third derivative and eps / h from rounding. The step is chosen at the first
product, from a few in proportion to |theta|, as the one whose product changes least when it is halved; later products
are checked the same way, ever more rarely. The first vector is random and curves little; along a top eigenvector the
third derivative asks for a far shorter step, which is then chosen anew. A change by more than `TOLERANCE` at every step
is noise, and the run fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nostalgia.errors import RunFailedError
from nostalgia.linalg.vector_space import VectorSpace

TOLERANCE = 0.02  # relative change of a product on halving the step
STEPS = {torch.float32: (1e-2, 1e-3, 1e-4), torch.float64: (1e-3, 1e-4, 1e-5)}  # of |theta|
SHORTEST = {torch.float32: 1e-5, torch.float64: 1e-6}  # where none of these will do

Difference = Callable[[Tensor, float], Tensor]


class CentralDifferences:
    """Products by a function ``difference(v (P_local,), step) -> (P_local,)``, with a step that has been checked.

    ``estimated_error`` is the largest relative change seen on halving the step: about what products are off by.
    All ranks must call `product` together.
    """

    def __init__(self, space: VectorSpace, parameter_norm: float) -> None:
        self._space, self._scale = space, parameter_norm or 1.0
        self.step: float | None = None  # length of the displacement
        self.estimated_error: float | None = None
        self._products = 0

    def product(self, v: Tensor, difference: Difference) -> Tensor:
        """H v (P_local,); raises RunFailedError where it is noise."""
        if self.step is None:
            if float(self._space.norm(v)) == 0.0:
                return torch.zeros_like(v)
            self._products = 1
            return self._choose(v, difference)
        self._products += 1
        result = difference(v, self.step)
        if self._products & (self._products - 1) == 0:  # the 2nd, 4th, 8th, 16th, ...
            change = self._change(result, difference(v, self.step / 2))
            if not change <= TOLERANCE:
                return self._choose(v, difference, change)
            self._accept(change)
        return result

    def _choose(self, v: Tensor, difference: Difference, least: float = math.inf) -> Tensor:
        """A product, on the way to which the step is chosen anew; ``least`` is its change with the present one.

        The present step is only ever shortened: a vector that wants a longer one has it for itself alone.
        """
        present, best = self.step or math.inf, torch.zeros_like(v)
        chosen = present
        curved = self.step is not None  # whether some step has shown a difference: none at a shorter one is rounding
        for relative in (*STEPS[self._space.dtype], SHORTEST[self._space.dtype]):
            step = relative * self._scale
            if step == present or (relative == SHORTEST[self._space.dtype] and least <= TOLERANCE):
                continue
            result = difference(v, step)
            half = difference(v, step / 2)
            vanished = curved and float(self._space.norm(half)) == 0.0
            change = math.inf if vanished else self._change(result, half)
            curved = curved or bool(change) or float(self._space.norm(half)) > 0.0
            if change <= least:
                best, least, chosen = result, change, step
        self._accept(least)
        self.step = min(present, chosen)
        return best

    def _change(self, whole: Tensor, half: Tensor) -> float:
        """Relative change of a product on halving the step."""
        size, change = float(self._space.norm(half)), float(self._space.norm(whole - half))
        if change == 0.0:
            return 0.0
        return change / size if size > 0 else math.inf

    def _accept(self, error: float) -> None:
        self.estimated_error = max(error, self.estimated_error or 0.0)
        if not error <= TOLERANCE:
            raise RunFailedError(
                f"finite-difference curvature is noise: product {self._products} changes by {error:.1%} when the step "
                f"is halved (allowed {TOLERANCE:.0%}); use curvature.hvp=exact, or float32 matrix products "
                "(curvature.precision=float32, under FSDP2 also train.precision=32)"
            )
