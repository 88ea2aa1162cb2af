"""Where in the network a subspace lies: the share of each parameter tensor in its directions."""

from __future__ import annotations

import torch
from torch import Tensor

from nostalgia.linalg.vector_space import VectorSpace


@torch.no_grad()
def parameter_shares(basis: Tensor, eigenvalues: Tensor, space: VectorSpace) -> list[float]:
    """Share of each parameter of ``space`` in the rows of ``basis`` (m, P_local), weighted by eigenvalue (m,).

    sum_i lambda_i |q_i on the parameter|^2 / sum_i lambda_i, over the positive eigenvalues: the shares sum to one.
    One small all-reduce; all zero without a positive eigenvalue.
    """
    weights = eigenvalues.to(device=basis.device, dtype=torch.float64).clamp_min(0.0)
    mass = torch.zeros(len(space.shapes), dtype=torch.float64, device=basis.device)
    position = 0
    for index, (low, high) in enumerate(space.layout.intervals[space.rank]):
        width = high - low
        for start in range(position, position + width, 1 << 16):
            part = basis[:, start : min(start + (1 << 16), position + width)].double()
            mass[index] += weights @ part.square().sum(dim=1)
        position += width
    space.all_reduce(mass)
    return (mass / mass.sum().clamp_min(torch.finfo(mass.dtype).tiny)).tolist()
