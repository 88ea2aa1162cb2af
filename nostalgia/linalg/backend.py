"""Lets hessian-eigenthings' algorithms (Hutchinson trace, spectral density) run on vectors spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from nostalgia.linalg.vector_space import VectorSpace


class SpaceBackend:
    """hessian-eigenthings' ``LinAlgBackend`` over a `VectorSpace`.

    That library makes a template of ``operator.size`` numbers and asks for random vectors like it: they come back as
    this rank's part of the same global vector, whatever the number of ranks.
    """

    def __init__(self, space: VectorSpace) -> None:
        self.space = space

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return self.space.dot(a, b).to(a.dtype)

    def norm(self, a: Tensor) -> Tensor:
        return self.space.norm(a).to(a.dtype)

    def axpy(self, alpha: float | Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.space.axpy(alpha, a, b)

    def scale(self, alpha: float | Tensor, a: Tensor) -> Tensor:
        return alpha * a

    def zeros_like(self, a: Tensor) -> Tensor:
        return self.space.zeros()

    def randn_like(self, a: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.space.randn(_draw_seed(generator))

    def rademacher_like(self, a: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.space.rademacher(_draw_seed(generator))


def _draw_seed(generator: torch.Generator | None) -> int:
    """The next number of ``generator``: ranks hold equally seeded ones, so they agree."""
    return int(torch.randint(0, 1 << 40, (), generator=generator))
