"""A dense symmetric matrix as an operator on a vector space: the oracle of the linear algebra's tests."""

from __future__ import annotations

import torch
from torch import Tensor

from nostalgia.linalg.vector_space import VectorSpace


class DenseOperator:
    """``matrix`` (P, P) as the sum of the ranks' shares, like curvature: a gather and a scatter a product."""

    def __init__(self, matrix: Tensor, space: VectorSpace) -> None:
        share = torch.tensor_split(torch.arange(space.size), space.world_size)[space.rank]
        self.columns = matrix[:, share].to(space.dtype)
        self.share, self.space = share, space
        self.size, self.device, self.dtype = space.size, space.device, space.dtype
        self.calls = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.calls += 1
        flat = torch.cat([t.reshape(-1) for t in self.space.gather(v)])
        product = self.columns @ flat[self.share]
        parts = product.split(self.space.layout.numels)
        return self.space.scatter([p.view(s) for p, s in zip(parts, self.space.shapes, strict=True)])


class Diagonal:
    """A diagonal matrix on one process: large spaces at little cost."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.space = values, VectorSpace.of({"values": values}, placement="local")

    def matvec(self, v: Tensor) -> Tensor:
        return self.values * v


def spectrum_matrix(eigenvalues: list[float] | Tensor, seed: int = 0) -> Tensor:
    """Symmetric float64 matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


def shapes_of(size: int) -> dict[str, Tensor]:
    """Parameters of mixed shapes, a scalar and an empty one among them, ``size`` numbers in all (>= 8)."""
    parameters = {"scalar": torch.zeros(()), "matrix": torch.zeros(3, 2), "none": torch.zeros(0, 3)}
    parameters["rest"] = torch.zeros(size - 7)
    return parameters
