"""Subspaces spread over ranks: orthonormal bases, merging under a rank budget, angles between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nostalgia.linalg.vector_space import VectorSpace

RESIDUAL_TOL = 1e-3  # a unit vector whose part outside a span is shorter than this adds noise, not a direction
EIGENVALUE_TOL = 1e-6  # an eigenvalue below this share of the largest is noise


@dataclass(frozen=True)
class Merged:
    """A merged eigenspace: ``basis`` (m, L) orthonormal rows, ``eigenvalues`` (m,) decreasing, float64 on CPU.

    ``dropped_eigenvalues`` are those of directions that had to go for the rank budget; noise is not counted.
    """

    basis: Tensor
    eigenvalues: Tensor
    dropped_eigenvalues: Tensor


def orthonormalise(x: Tensor, space: VectorSpace, drop_tol: float = RESIDUAL_TOL) -> tuple[Tensor, Tensor]:
    """Orthonormal rows spanning those of x (m, L), in order; rows within ``drop_tol`` of the earlier ones are dropped.

    Returns (basis (r, L), kept (m,) bool). A row is judged by the length of its part outside the earlier rows' span,
    relative to its own length. By the Gram matrix in float64, polished once: orthonormal to the vectors' rounding.
    """
    gram = space.gram(x, x).cpu()
    norms = gram.diagonal().clamp_min(0).sqrt()
    unit = gram / norms.clamp_min(torch.finfo(torch.float64).tiny).outer(
        norms.clamp_min(torch.finfo(torch.float64).tiny)
    )
    coefficients, kept = _select_rows(unit, norms, drop_tol)  # (r, m) acting on unit rows
    basis = space.combine(coefficients / norms.clamp_min(torch.finfo(torch.float64).tiny), x)
    return polish(basis, space), kept


def polish(basis: Tensor, space: VectorSpace) -> Tensor:
    """Nearly orthonormal rows made orthonormal to rounding, by the inverse square root of their Gram matrix."""
    if basis.shape[0] == 0:
        return basis
    values, vectors = torch.linalg.eigh(space.gram(basis, basis).cpu())
    return space.combine(vectors @ torch.diag(values.rsqrt()) @ vectors.T, basis)


def merge_union(
    spaces: Sequence[tuple[Tensor, Tensor]], k_max: int, space: VectorSpace
) -> Merged:
    """Span of all (Q_t (m_t, L), lambda_t (m_t,)), as eigenpairs of sum_t Q_t^T diag(lambda_t) Q_t within it.

    At most ``k_max`` rows: the least eigenvalues are dropped first. Only positive eigenvalues count.
    """
    rows = torch.cat([basis for basis, _ in spaces])
    weights = torch.cat([values.double().cpu() for _, values in spaces])
    return _merge(rows, weights, k_max, space)


def merge_average(
    old_basis: Tensor, old_values: Tensor, basis: Tensor, values: Tensor, tasks: int, k: int, space: VectorSpace
) -> Merged:
    """Mean Hessian of ``tasks`` tasks at rank ``k``: (t-1)/t of the old mean and 1/t of the new task's.

    The thin SVD of F = [sqrt(lambda_i) q_i] scaled by these weights, by its small Gram matrix; never a P x P matrix.
    """
    share = (tasks - 1) / tasks
    rows = torch.cat([old_basis, basis])
    weights = torch.cat([share * old_values.double().cpu(), values.double().cpu() / tasks])
    return _merge(rows, weights, k, space)


def principal_angles(first: Tensor, second: Tensor, space: VectorSpace) -> Tensor:
    """Principal angles, increasing, in radians (min(m, n),) between spans of orthonormal rows (m, L) and (n, L).

    Small angles come from their sines (the part of one basis outside the other), large ones from their cosines:
    either alone loses half the digits at its end (Bjorck and Golub 1973).
    """
    if first.shape[0] < second.shape[0]:
        first, second = second, first
    overlap = space.gram(second, first)  # (n, m)
    cosines = torch.linalg.svdvals(overlap.cpu()).clamp(max=1.0)
    outside = second - space.combine(overlap, first)
    sines = torch.linalg.eigvalsh(space.gram(outside, outside).cpu()).clamp(0.0, 1.0).sqrt()
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def _merge(rows: Tensor, weights: Tensor, budget: int, space: VectorSpace) -> Merged:
    """Eigenpairs of sum_i w_i q_i q_i^T over unit rows q_i with w_i > 0, at most ``budget``.

    Noise goes first: rows of weight under EIGENVALUE_TOL of the largest, then rows within RESIDUAL_TOL of the span of
    the heavier ones (their weight stays, as what of it lies in the span).
    """
    empty = Merged(space.zeros(0), torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    if len(weights) == 0 or float(weights.max()) <= 0:
        return empty
    order = weights.argsort(descending=True)
    order = order[weights[order] > EIGENVALUE_TOL * weights.max()]
    rows, weights = rows[order.to(rows.device)], weights[order]
    basis, _ = orthonormalise(rows, space)
    inside = space.gram(basis, rows).cpu()  # (r, m): rows in coordinates of the basis
    values, vectors = torch.linalg.eigh((inside * weights) @ inside.T)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > EIGENVALUE_TOL * values[0]
    values, vectors = values[keep], vectors[:, keep]
    merged = space.combine(vectors[:, :budget].T, basis)
    return Merged(polish(merged, space), values[:budget].clone(), values[budget:].clone())


def _select_rows(gram: Tensor, norms: Tensor, drop_tol: float) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt, in order, on vectors known only by their Gram matrix (m, m) of unit rows, float64.

    Returns coefficients (r, m) of orthonormal combinations and which rows were kept. The part outside a span cannot be
    told below the square root of the Gram matrix's own rounding, which RESIDUAL_TOL is well above.
    """
    m = gram.shape[0]
    kept = torch.zeros(m, dtype=torch.bool)
    coefficients: list[Tensor] = []
    for i in range(m):
        if norms[i] == 0:
            continue
        row = torch.zeros(m, dtype=torch.float64)
        row[i] = 1.0
        for _ in range(2):
            for c in coefficients:
                row -= (c @ gram @ row) * c
        length = (row @ gram @ row).clamp_min(0).sqrt()
        if length > drop_tol:
            kept[i] = True
            coefficients.append(row / length)
    return torch.stack(coefficients) if coefficients else torch.zeros(0, m, dtype=torch.float64), kept
