"""An operator in some of its coordinates alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nostalgia.linalg.krylov import Operator
from nostalgia.linalg.vector_space import VectorSpace


@dataclass(frozen=True)
class Restricted:
    """M C M of an operator C, with M the diagonal of ``mask`` (P_local,): 1 at the coordinates that count, 0 at the others."""

    operator: Operator
    mask: Tensor

    @property
    def space(self) -> VectorSpace:
        return self.operator.space

    def matvec(self, v: Tensor) -> Tensor:
        """The product with v (P_local,)."""
        return self.operator.matvec(v * self.mask) * self.mask
