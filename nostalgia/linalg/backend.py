"""Lets hessian-eigenthings' Hutchinson trace and spectral density run on vectors spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from nostalgia.linalg.vector_space import VectorSpace


class SpaceBackend:
    """hessian-eigenthings' ``LinAlgBackend`` over a `VectorSpace`: pass it as ``backend=`` to its algorithms.

    ``trace(operator, method="hutchinson", backend=SpaceBackend(operator.space))`` and ``spectral_density``
    then give the same answer on any number of ranks. They allocate a template of ``operator.size`` = P
    numbers and ask for random vectors like it; what they get is this rank's part of one global vector,
    whatever the template's length. ``method="hutch++"`` multiplies vectors itself: one process only.
    """

    def __init__(self, space: VectorSpace) -> None:
        self.space = space
        self._draws = 0

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
        return self.space.randn(self._seed(generator))

    def rademacher_like(self, a: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.space.rademacher(self._seed(generator))

    def _seed(self, generator: torch.Generator | None) -> int:
        """Seed of the next draw, the same on all ranks: their generators, or their counts, are alike."""
        if generator is not None:
            return int(torch.randint(0, 1 << 40, (), generator=generator, device=generator.device))
        self._draws += 1
        return self._draws
