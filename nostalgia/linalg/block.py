"""Vectors spread over ranks as one value, for state that is saved and restored on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nostalgia.linalg.vector_space import VectorSpace


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of vectors: this rank's part, and the space that says which part it is.

    A block that is restored comes in the run's own space, whatever space it was saved in; `to` changes that.
    """

    rows: Tensor  # (m, P_local)
    space: VectorSpace

    def to(self, space: VectorSpace) -> Tensor:
        """The rows as they lie in ``space``: as they are, or gathered whole on every rank (a collective)."""
        if space.placement == self.space.placement:
            return self.rows
        if space.placement == "local":
            return self.space.gather_flat(self.rows)
        return space.slice_flat(self.rows)
