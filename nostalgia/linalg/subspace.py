"""Subspaces spread over ranks: orthonormal bases, merging under a rank budget, angles between them.

A set of rows is known here by its Gram matrix, taken in float64 of the numbers as stored, and what is decided
in these small coordinates is applied to the rows once: no second copy of a basis, few and small collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nostalgia.linalg.vector_space import VectorSpace

# A unit vector whose part outside a span is shorter than this adds noise, not a direction.
RESIDUAL_TOL = 1e-3
# An eigenvalue below this share of the largest is noise.
EIGENVALUE_TOL = 1e-6
# An eigenvalue below this share of the largest is lost in float64's roundings.
ROUNDING_TOL = 1e-13


@dataclass(frozen=True)
class Merged:
    """A merged eigenspace: ``basis`` (m, L) orthonormal, ``eigenvalues`` (m,) decreasing, float64 on CPU.

    ``dropped_eigenvalues`` are those of directions that had to go for the rank budget; noise is not counted.
    """

    basis: Tensor
    eigenvalues: Tensor
    dropped_eigenvalues: Tensor


@torch.no_grad()
def orthonormalise(x: Tensor, space: VectorSpace, drop_tol: float = RESIDUAL_TOL) -> tuple[Tensor, Tensor]:
    """Orthonormal rows that span those of x (m, L), in order, without the rows that add nothing.

    A row is dropped when its part outside the earlier rows' span is at most ``drop_tol`` of its length
    (``drop_tol`` >= 1e-7, what a Gram matrix in float64 can tell). Returns (basis (r, L), kept (m,) bool).
    """
    coefficients, kept = _gram_schmidt(_gram([x], space), drop_tol)
    return polish_(_combine(coefficients, [x], space), space), kept


@torch.no_grad()
def polish_(basis: Tensor, space: VectorSpace) -> Tensor:
    """Nearly orthonormal rows (m, L) made orthonormal to rounding, in place: the nearest such rows."""
    gram = _gram([basis], space)
    defect = gram - torch.eye(len(gram), dtype=gram.dtype)
    if defect.numel() == 0 or float(defect.abs().max()) <= 8 * torch.finfo(basis.dtype).eps:
        return basis
    values, vectors = torch.linalg.eigh(gram)
    return space.combine_((vectors * values.rsqrt()) @ vectors.T, basis)


@torch.no_grad()
def merge_union(spaces: Sequence[tuple[Tensor, Tensor]], k_max: int, space: VectorSpace) -> Merged:
    """Span of all (Q_t (m_t, L), lambda_t (m_t,)), as eigenpairs of sum_t Q_t^T diag(lambda_t) Q_t within it.

    At most ``k_max`` rows: the least eigenvalues are dropped first. Only positive eigenvalues count. Noise is told from
    within each space alone: a task that is fitted well keeps its directions beside one that curves a million times more.
    """
    weights = [values.double().cpu() for _, values in spaces]
    return _merge([basis for basis, _ in spaces], weights, k_max, space, apart=True)


@torch.no_grad()
def merge_average(
    old_basis: Tensor,  # (m, L)
    old_values: Tensor,  # (m,)
    basis: Tensor,  # (n, L)
    values: Tensor,  # (n,)
    tasks: int,
    k: int,
    space: VectorSpace,
) -> Merged:
    """Mean Hessian of ``tasks`` tasks at rank ``k``: (t-1)/t of the old mean and 1/t of the new task's.

    The thin SVD of F, whose rows are q_i scaled by the root of their weighted eigenvalue, by its small Gram
    matrix; never a P x P matrix. Only positive eigenvalues count.
    """
    return merge_weighted(old_basis, old_values, basis, values, 1 / tasks, k, space)


@torch.no_grad()
def merge_weighted(
    old_basis: Tensor,  # (m, L)
    old_values: Tensor,  # (m,)
    basis: Tensor,  # (n, L)
    values: Tensor,  # (n,)
    share: float,
    k: int,
    space: VectorSpace,
) -> Merged:
    """(1 - share) of the old matrix and ``share`` of the new one at rank ``k``, as `merge_average` computes it."""
    weights = [(1 - share) * old_values.double().cpu(), share * values.double().cpu()]
    return _merge([old_basis, basis], weights, k, space)


@torch.no_grad()
def principal_angles(first: Tensor, second: Tensor, space: VectorSpace) -> Tensor:
    """Principal angles (min(m, n),) in radians, increasing, between spans of orthonormal (m, L) and (n, L).

    Small angles come from their sines (the part of one basis outside the other), large ones from their
    cosines: either alone loses half the digits at its end (Bjorck and Golub 1973).
    """
    if first.shape[0] < second.shape[0]:
        first, second = second, first
    overlap = space.gram(second, first, exact=True)  # (n, m)
    outside = torch.zeros(len(second), len(second), dtype=torch.float64, device=space.device)
    for columns in space.columns():
        part = second[:, columns].double() - overlap @ first[:, columns].double()
        outside += part @ part.T
    sines = torch.linalg.eigvalsh(space.all_reduce(outside).cpu()).clamp(0.0, 1.0).sqrt()
    cosines = torch.linalg.svdvals(overlap.cpu()).clamp(max=1.0)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def _merge(
    blocks: list[Tensor], weights: list[Tensor], budget: int, space: VectorSpace, *, apart: bool = False
) -> Merged:
    """Eigenpairs of sum_i w_i q_i q_i^T over the blocks' unit rows q_i with w_i > 0, at most ``budget``.

    Noise goes first: rows of weight under EIGENVALUE_TOL of the largest (with ``apart``: of float64's roundings alone;
    what is noise within a block has been told when it was solved), then rows within RESIDUAL_TOL of the span of the
    heavier ones (what of them lies in that span keeps its weight).
    """
    tolerance = ROUNDING_TOL if apart else EIGENVALUE_TOL
    weight = torch.cat([torch.zeros(0, dtype=torch.float64), *weights])
    order = weight.argsort(descending=True)
    order = order[weight[order] > tolerance * weight.max().clamp_min(0.0)] if len(order) else order
    if len(order) == 0:
        none = torch.zeros(0, dtype=torch.float64)
        return Merged(space.zeros(0), none, none)
    gram = _gram(blocks, space)[order][:, order]
    coefficients, _ = _gram_schmidt(gram, RESIDUAL_TOL)  # (r, m): an orthonormal basis in terms of the rows
    inside = coefficients @ gram  # (r, m): the rows in coordinates of that basis
    values, vectors = torch.linalg.eigh((inside * weight[order]) @ inside.T)
    values, vectors = values.flip(0), vectors.flip(1)
    values = values[values > tolerance * values[0]]
    kept = values[:budget]
    chosen = torch.zeros(len(kept), len(weight), dtype=torch.float64)
    chosen[:, order] = vectors[:, : len(kept)].T @ coefficients
    basis = polish_(_combine(chosen, blocks, space), space)
    return Merged(basis, kept.clone(), values[budget:].clone())


def _gram(blocks: Sequence[Tensor], space: VectorSpace) -> Tensor:
    """All inner products (m, m) between the rows of ``blocks``, of the numbers as stored: float64 on CPU."""
    rows = sum(block.shape[0] for block in blocks)
    total = torch.zeros(rows, rows, dtype=torch.float64, device=space.device)
    for columns in space.columns():
        part = torch.cat([block[:, columns].double() for block in blocks])
        total += part @ part.T
    return space.all_reduce(total).cpu()


def _combine(coefficients: Tensor, blocks: Sequence[Tensor], space: VectorSpace) -> Tensor:
    """coefficients (n, m) @ the blocks' m rows -> (n, L), rounded once."""
    out = space.zeros(coefficients.shape[0])
    coefficients = coefficients.to(space.device)
    for columns in space.columns():
        stacked = torch.cat([block[:, columns].double() for block in blocks])
        out[:, columns] = (coefficients @ stacked).to(out.dtype)
    return out


def _gram_schmidt(gram: Tensor, drop_tol: float) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt, in order, on rows known only by their Gram matrix (m, m).

    Returns the coefficients (r, m) of the orthonormal combinations, and which rows were kept (m,).
    """
    m = gram.shape[0]
    lengths = gram.diagonal().clamp_min(0.0).sqrt()
    kept = torch.zeros(m, dtype=torch.bool)
    coefficients = torch.zeros(m, m, dtype=torch.float64)
    count = 0
    for i in range(m):
        if lengths[i] == 0:
            continue
        row = torch.zeros(m, dtype=torch.float64)
        row[i] = 1.0 / lengths[i]
        earlier = coefficients[:count]
        for _ in range(2):
            row -= earlier.T @ (earlier @ (gram @ row))
        length = float(row @ gram @ row)
        if length > drop_tol**2:
            kept[i] = True
            coefficients[count] = row / length**0.5
            count += 1
    return coefficients[:count], kept
