"""Thick-restart Lanczos: the top eigenpairs of a symmetric operator, with residuals that can be trusted.

The basis V (m, L) stays orthonormal to rounding (blocked classical Gram-Schmidt, twice), so no ghosts arise. At
``max_basis`` rows it is restarted on the best Ritz vectors (Wu and Simon 2000; for a symmetric operator the
Krylov-Schur method, Stewart 2001). With H = V A V^T as measured, column by column,

    A V_j = sum_i H_ij V_i  +  [j = m] beta v_{m+1}  +  (what earlier restarts cut off, by its Gram matrix G)

and (theta, s) an eigenpair of T = (H + H^T) / 2, the Ritz pair (theta, V^T s) has the residual

    |A y - theta y|^2 = (beta s_m)^2 + |(H - T) s|^2 + s^T G s.

The second term is zero for an exactly symmetric operator; it measures the noise of products in low precision, so that
such pairs are not called converged.

A single-vector Krylov method sees one vector of a repeated eigenvalue only. So once all pairs converge, the solve goes
on for ``probe`` products from a random vector orthogonal to what was found; copies that were missed show up there and
are iterated to convergence in turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.vector_space import VectorSpace

WHICH = ("largest", "magnitude")
COLUMNS = 1 << 16  # of the basis rotated at once at a restart: bounds the extra memory


class Operator(Protocol):
    """A symmetric linear operator on the vectors of ``space``."""

    space: VectorSpace

    def matvec(self, v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs in order of ``which``; vectors are this rank's part."""

    eigenvalues: Tensor  # (k,) float64, CPU
    eigenvectors: Tensor  # (k, P_local), orthonormal rows
    residuals: Tensor  # (k,) float64, CPU: |A y - lambda y|
    converged: Tensor  # (k,) bool, CPU
    products: int
    collectives: int
    bytes_moved: int
    seconds: float
    tol: float
    space: VectorSpace


@dataclass(frozen=True)
class Progress:
    """Where a solve stands; ``state`` is live: copy it (`LanczosState.clone`) to keep it."""

    products: int
    converged: int
    wanted: int
    worst_residual: float  # relative to its eigenvalue, over the wanted pairs so far
    state: LanczosState


@dataclass
class LanczosState:
    """All of a solve: going on from it is going on as if it had not stopped."""

    basis: Tensor  # (max_basis + 1, P_local); rows past m are scratch
    projected: Tensor  # H (max_basis, max_basis) float64, CPU
    lost: Tensor  # G (max_basis, max_basis) float64, CPU
    m: int = 0  # rows of the basis whose product is known; row m is the next one
    beta: float = 0.0  # coupling of row m to row m - 1
    products: int = 0
    draws: int = 0  # random vectors drawn
    probe_until: int | None = None  # products at which a running probe ends
    probed: bool = False

    def clone(self) -> LanczosState:
        copy = LanczosState(**vars(self))
        copy.basis, copy.projected, copy.lost = self.basis.clone(), self.projected.clone(), self.lost.clone()
        return copy


@torch.no_grad()
def lanczos(
    operator: Operator,
    k: int,
    tol: float = 1e-3,
    max_products: int | None = None,
    max_basis: int | None = None,
    which: str = "largest",
    seed: int = 0,
    *,
    probe: int = 8,
    true_residuals: bool = False,
    callback: Callable[[Progress], None] | None = None,
    state: LanczosState | None = None,
) -> Eigenpairs:
    """The ``k`` algebraically largest eigenpairs (``which="magnitude"``: largest in absolute value).

    A pair is converged when its residual is at most ``tol`` |lambda|, or at most rounding next to the largest
    |lambda| (what an eigenvalue of zero can reach). The solve stops when all are, or after ``max_products`` products;
    pairs that are not converged are returned and marked, never called converged. ``max_basis`` (default 2 k + 16)
    bounds the vectors held. ``true_residuals`` recomputes the residuals by ``k`` products more.

    Raises UsageError for a ``k`` outside 1..P and RunFailedError for a product that is not finite.
    """
    solve = _Solve(operator, k, tol, max_products, max_basis, which, seed, probe, state)
    return solve.run(callback, true_residuals)


@dataclass
class _Ritz:
    """Ritz pairs of the present basis, wanted ones first."""

    values: Tensor  # (m,) float64
    vectors: Tensor  # (m, m) float64, columns
    residuals: Tensor  # (m,) float64
    converged: Tensor  # (m,) bool


@dataclass
class _Solve:
    operator: Operator
    k: int
    tol: float
    max_products: int | None
    max_basis: int | None
    which: str
    seed: int
    probe: int
    state: LanczosState | None
    space: VectorSpace = field(init=False)

    def __post_init__(self) -> None:
        self.space = space = self.operator.space
        if not 1 <= self.k <= space.size:
            raise UsageError(
                f"top_k={self.k}: allowed is 1 to {space.size}, the number of parameters the curvature is taken over"
            )
        if self.which not in WHICH:
            raise UsageError(f"which={self.which!r}: allowed are {', '.join(WHICH)}")
        if not self.tol > 0:
            raise UsageError(f"tol={self.tol}: the tolerance on residuals must be positive")
        wanted = 2 * self.k + 16 if self.max_basis is None else self.max_basis
        if wanted < min(self.k + 2, space.size):
            raise UsageError(f"max_basis={wanted} is too small for top_k={self.k}: allowed is {self.k + 2} or more")
        self.rows = min(wanted, space.size)
        self.cap = 16 * (2 * self.k + 16) if self.max_products is None else self.max_products
        self.epsilon = torch.finfo(space.dtype).eps
        if self.state is None:
            self.state = LanczosState(
                basis=space.zeros(self.rows + 1),
                projected=torch.zeros(self.rows, self.rows, dtype=torch.float64),
                lost=torch.zeros(self.rows, self.rows, dtype=torch.float64),
            )

    def run(self, callback: Callable[[Progress], None] | None, true_residuals: bool) -> Eigenpairs:
        started, before = time.perf_counter(), self.space.traffic.snapshot()
        s = self._s
        if s.products == 0:
            self._insert_random()
        ritz = self._ritz() if s.m else None
        while s.products < self.cap:
            self._expand()
            ritz = self._ritz()
            if callback is not None:
                callback(self._progress(ritz))
            if self._finished(ritz):
                break
            if s.m == self.rows:
                self._restart(ritz, self.k + (self.rows - self.k) // 2, keep_residual=True)
        assert ritz is not None
        # A break right after a restart cannot happen: restarts follow the test, and expand follows restarts.
        return self._result(self._ritz(), true_residuals, started, before)

    @property
    def _s(self) -> LanczosState:
        assert self.state is not None
        return self.state

    def _expand(self) -> None:
        """One product, orthogonalised against the whole basis: two small all-reduces."""
        s, space = self._s, self.space
        w = self.operator.matvec(s.basis[s.m])
        s.products += 1
        basis = s.basis[: s.m + 1]
        first = space.gram(basis, w[None])[:, 0]
        if not bool(torch.isfinite(first).all()):
            raise RunFailedError(
                f"curvature product {s.products} is not finite: the loss or its second derivative overflows at these "
                "parameters; try nostalgia.precision=float64 or a smaller train.lr"
            )
        w = w - space.combine(first[None], basis)[0]
        second = space.gram(torch.cat([basis, w[None]]), w[None])[:, 0]
        w -= space.combine(second[None, :-1], basis)[0]
        column = (first + second[:-1]).cpu()
        # By Pythagoras the part left after the second pass; exact enough, for what that pass removes is rounding.
        beta = math.sqrt(max(0.0, float(second[-1]) - float(second[:-1] @ second[:-1])))
        s.projected[: s.m + 1, s.m] = column
        if s.m > 0 and s.beta:
            s.projected[s.m, s.m - 1] = s.beta
        s.m += 1
        scale = float(s.projected[: s.m, : s.m].abs().max())
        if beta <= 10 * self.epsilon * max(scale, beta):
            s.beta = 0.0
            self._insert_random()  # an invariant subspace: go on outside it
        else:
            s.beta = beta
            s.basis[s.m] = w / beta

    def _insert_random(self) -> None:
        """A random unit vector orthogonal to the basis becomes the next row (none is left when the basis is all of R^P)."""
        s, space = self._s, self.space
        if s.m >= space.size:
            return
        s.draws += 1
        vector = space.randn(self.seed * 1_000 + s.draws)
        basis = s.basis[: s.m]
        for _ in range(3):
            vector = vector / space.norm(vector).to(vector.dtype)
            vector = vector - space.combine(space.gram(vector[None], basis), basis)[0]
        s.basis[s.m] = vector / space.norm(vector).to(vector.dtype)

    def _ritz(self) -> _Ritz:
        s = self._s
        h = s.projected[: s.m, : s.m]
        t = (h + h.T) / 2
        values, vectors = torch.linalg.eigh(t)
        order = (values if self.which == "largest" else values.abs()).argsort(descending=True)
        values, vectors = values[order], vectors[:, order]
        noise = (h - t) @ vectors
        squared = (s.beta * vectors[-1]) ** 2 + (noise**2).sum(0)
        squared += ((s.lost[: s.m, : s.m] @ vectors) * vectors).sum(0)
        residuals = squared.clamp_min(0).sqrt()
        floor = 10 * self.epsilon * float(values.abs().max())
        return _Ritz(values, vectors, residuals, residuals <= (self.tol * values.abs()).clamp_min(floor))

    def _finished(self, ritz: _Ritz) -> bool:
        """All wanted pairs converged, and a probe from a random vector found nothing that was missed."""
        s = self._s
        if s.m >= self.space.size:
            return True  # the projected problem is the whole problem
        if s.m < self.k or not bool(ritz.converged[: self.k].all()):
            if s.probe_until is not None and s.products >= s.probe_until:
                s.probe_until = None  # it found something: converge, then probe again
            return False
        if self.probe == 0 or (s.probe_until is not None and s.products >= s.probe_until):
            return True
        if s.probe_until is None:
            self._start_probe(ritz)
        return False

    def _start_probe(self, ritz: _Ritz) -> None:
        """Restart on the converged pairs, wanted ones first, and go on from a random vector."""
        s = self._s
        converged = int(ritz.converged[self.k :].long().cumprod(0).sum())
        keep = min(self.k + converged, self.rows - 2, self.space.size - 1)
        if keep < self.k:
            keep = min(self.k, self.rows - 1)
        self._restart(ritz, keep, keep_residual=False)
        s.probe_until = s.products + self.probe

    def _restart(self, ritz: _Ritz, keep: int, *, keep_residual: bool) -> None:
        """Compress the basis to its first ``keep`` Ritz vectors; what is cut off them goes into G."""
        s = self._s
        m, rotation = s.m, ritz.vectors  # (m, m)
        kept = rotation[:, :keep]
        h = s.projected[:m, :m]
        rotated = rotation.T @ h @ kept  # (m, keep)
        cut = rotated[keep:]
        coupling = s.beta * rotation[-1, :keep]  # (keep,) to row m, the residual's direction
        lost = kept.T @ s.lost[:m, :m] @ kept + cut.T @ cut
        if not keep_residual:
            lost += torch.outer(coupling, coupling)
        s.projected.zero_()
        s.lost.zero_()
        s.projected[:keep, :keep] = rotated[:keep]
        s.lost[:keep, :keep] = lost
        self._rotate(kept)
        if keep_residual:
            s.basis[keep] = s.basis[m]
            s.projected[keep, :keep] = coupling
        s.m, s.beta = keep, 0.0
        if not keep_residual:
            self._insert_random()

    def _rotate(self, kept: Tensor) -> None:
        """``basis[:keep] = kept^T basis[:m]``, in blocks of columns: no second basis is held."""
        basis, (m, keep) = self._s.basis, kept.shape
        for start in range(0, basis.shape[1], COLUMNS):
            block = basis[:, start : start + COLUMNS]
            block[:keep] = self.space.combine(kept.T, block[:m])

    def _progress(self, ritz: _Ritz) -> Progress:
        values, residuals = ritz.values[: self.k], ritz.residuals[: self.k]
        relative = residuals / values.abs().clamp_min(torch.finfo(torch.float64).tiny)
        return Progress(
            products=self._s.products,
            converged=int(ritz.converged[: self.k].sum()),
            wanted=self.k,
            worst_residual=float(relative.max()),
            state=self._s,
        )

    def _result(self, ritz: _Ritz, true_residuals: bool, started: float, before) -> Eigenpairs:
        s, space = self._s, self.space
        k = min(self.k, s.m)
        kept = ritz.vectors[:, :k]
        kept = kept * kept.gather(0, kept.abs().argmax(0, keepdim=True)).sign()  # the same sign for a seed
        self._rotate(kept)
        vectors, values, residuals = s.basis[:k].clone(), ritz.values[:k], ritz.residuals[:k]
        converged = ritz.converged[:k]
        if true_residuals:
            errors = [self.operator.matvec(y) - lam * y for y, lam in zip(vectors, values.tolist(), strict=True)]
            residuals = torch.stack([space.norm(e) for e in errors]).cpu()
            s.products += k
            floor = 10 * self.epsilon * float(ritz.values.abs().max())
            converged = residuals <= (self.tol * values.abs()).clamp_min(floor)
        moved = space.traffic.since(before)
        return Eigenpairs(
            eigenvalues=values,
            eigenvectors=vectors,
            residuals=residuals,
            converged=converged,
            products=s.products,
            collectives=moved.large + moved.small,
            bytes_moved=moved.bytes,
            seconds=time.perf_counter() - started,
            tol=self.tol,
            space=space,
        )
