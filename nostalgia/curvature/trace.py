"""Trace of the curvature that a few eigenpairs leave out, by Hutchinson's estimator."""

from __future__ import annotations

import torch
from torch import Tensor

from nostalgia.linalg.krylov import Operator


@torch.no_grad()
def trace_outside(
    operator: Operator, basis: Tensor, kept: Tensor, samples: int, seed: int = 0
) -> tuple[float, float | None]:
    """tr((I - Q^T Q) H (I - Q^T Q)) with Q the orthonormal rows ``kept`` (k,) of ``basis`` (m, P_local).

    The mean of z^T H z over ``samples`` random sign vectors z taken off Q: the trace of H is this plus the Rayleigh
    quotients of Q. The largest eigenvalues, which would make plain Hutchinson noisy, are left to Q (the idea of
    Hutch++, Meyer et al. 2021). One product a sample; the same vectors for a seed on any number of ranks.
    Returns the estimate and its standard error (None for one sample).
    """
    space = operator.space
    values = torch.zeros(samples, dtype=torch.float64)
    mask = torch.zeros(len(basis), dtype=torch.float64)
    mask[kept] = 1.0
    for i in range(samples):
        z = space.rademacher((seed + 1) * 1_000_003 + i)
        if len(basis):
            coefficients = space.gram(basis, z[None]).cpu()[:, 0] * mask
            z = z - space.combine(coefficients[None], basis)[0]
        values[i] = space.dot(z, operator.matvec(z)).cpu()
    error = float(values.std(correction=1) / samples**0.5) if samples > 1 else None
    return float(values.mean()), error
