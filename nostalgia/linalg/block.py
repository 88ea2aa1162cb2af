"""Vectors spread over ranks as one value, for state that is saved and restored on any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nostalgia.linalg.vector_space import VectorSpace


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of vectors: this rank's part, and the space that says which part it is."""

    rows: Tensor  # (m, P_local)
    space: VectorSpace
