"""Products with the memory's rows Q (m, P_local), in the precision and the pieces that their storage asks for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nostalgia.linalg.precision import full_precision_matmul
from nostalgia.linalg.vector_space import VectorSpace

# Columns of Q handled at once where Q cannot be used as it lies (another dtype, or scaled by the metric): small enough
# that the scaled copy stays in the cache, large enough to keep a GPU busy.
CHUNK = {"cpu": 1 << 14, "cuda": 1 << 17}
# Rows of Q times all earlier ones at once: half of a symmetric matrix is enough. A GPU wants fewer, larger calls.
ROWS = {"cpu": 64, "cuda": 256}


class BasisRows:
    """Q (m, P_local) in ``space``; vectors are (P_local,) in the space's dtype."""

    def __init__(self, basis: Tensor, space: VectorSpace) -> None:
        self.basis, self.space = basis, space

    def __len__(self) -> int:
        return self.basis.shape[0]

    def coefficients(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Q v (m,) and |v|^2 in float64: one pass over Q, one small all-reduce for both."""
        partial = torch.zeros(len(self) + 1, dtype=torch.float64, device=vector.device)
        for columns, block in self._chunks():
            partial[:-1] += torch.mv(block, vector[columns])
        partial[-1] = torch.dot(vector, vector) if vector.numel() else 0.0
        self.space.all_reduce(partial)
        return partial[:-1], partial[-1]

    def subtract(self, vector: Tensor, coefficients: Tensor) -> None:
        """``vector -= Q^T coefficients`` in place: one pass over Q."""
        weights = coefficients.to(vector.dtype)
        for columns, block in self._chunks():
            vector[columns].addmv_(block.T, weights, alpha=-1)

    def combination(self, coefficients: Tensor) -> Tensor:
        """Q^T coefficients (P_local,): one pass over Q."""
        weights = coefficients.to(self.space.dtype)
        result = torch.empty(self.basis.shape[1], dtype=self.space.dtype, device=self.basis.device)
        for columns, block in self._chunks():
            torch.mv(block.T, weights, out=result[columns])
        return result

    def weighted_gram(self, weights: Tensor) -> Tensor:
        """Q diag(weights) Q^T (m, m) in float64 for ``weights`` (P_local,) above zero: m^2 P work, no scaled copy of Q."""
        m, device = len(self), weights.device.type
        rows = ROWS.get(device, ROWS["cuda"])
        gram = torch.zeros(m, m, dtype=torch.float64, device=weights.device)
        # Weights enter as their square root on both sides: the matrix stays positive definite to rounding.
        root, buffer = weights.sqrt(), weights.new_empty(0)
        for columns in self._columns():
            block = self.basis[:, columns]
            if (
                buffer.numel() < block.numel()
            ):  # one for all pieces: on a CPU a fresh one each costs as much as the product
                buffer = weights.new_empty(block.numel())
            scaled = torch.mul(block, root[columns], out=buffer[: block.numel()].view(block.shape))
            with full_precision_matmul(device):
                for start in range(0, m, rows):
                    stop = min(start + rows, m)
                    gram[start:stop, :stop] += scaled[start:stop] @ scaled[:stop].T
        gram = gram.tril() + gram.tril(-1).T
        self.space.all_reduce(gram)
        return gram

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Column blocks of Q in the vectors' dtype; one block, without a copy, where Q is stored in it."""
        basis, dtype = self.basis, self.space.dtype
        if basis.dtype == dtype:
            yield slice(0, basis.shape[1]), basis
            return
        for columns in self._columns():
            yield columns, basis[:, columns].to(dtype)

    def _columns(self) -> Iterator[slice]:
        width, size = CHUNK.get(self.basis.device.type, CHUNK["cuda"]), self.basis.shape[1]
        for start in range(0, size, width):
            yield slice(start, min(start + width, size))
