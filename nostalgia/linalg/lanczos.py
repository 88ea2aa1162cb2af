"""Thick-restart Lanczos: the top eigenpairs of a symmetric operator, with residuals that can be trusted.

The basis stays orthonormal to rounding (blocked classical Gram-Schmidt, twice), so no eigenvalue appears more
often than it is there: no ghosts. Converged pairs are kept through every restart with their couplings, not
frozen: a pair frozen at a residual of tol |lambda_1| could keep pairs of far smaller eigenvalues from ever
converging.

What Lanczos from one vector cannot see is the second vector of a repeated eigenvalue. Where products stay
inside the basis (an invariant subspace) a random vector outside it goes on. Else, when all pairs have
converged, the solve *probes*: at most ``probe`` products from a random vector x orthogonal to all vectors
found. If that changes the wanted pairs they are iterated to convergence and probed again, twice as long.

The first probe ends early when it has seen enough. With p_i the orthonormal polynomials of its recurrence,
1 / sum_{i <= j} p_i(theta)^2 bounds the weight (u . x)^2 that an eigenvector u of an eigenvalue theta outside
the probe's Ritz values can have (the Christoffel function: the least |p(A) x|^2 of p of degree j with
p(theta) = 1). A random x has less in one of n dimensions with a probability of at most
(2 n / pi / sum p_i^2)^(1/2): when that is below `MISSED`, an eigenvalue as large as the wanted ones would have
shown. Where the wanted eigenvalues hardly exceed what is left, ``probe`` products end it, and a copy of the last
ones may be missed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nostalgia.errors import UsageError
from nostalgia.linalg.krylov import Krylov, LanczosState, Operator, Ritz
from nostalgia.linalg.subspace import polish_
from nostalgia.linalg.vector_space import VectorSpace

__all__ = ["Eigenpairs", "LanczosProgress", "LanczosState", "Operator", "lanczos"]

WHICH = ("largest", "magnitude")
# An eigenvalue of zero converges to this many roundings of the largest |lambda|.
FLOOR = 10.0
# A probe may end after half its products, when the chance that it overlooked an eigenvector is below this.
MISSED = 0.05


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs in order of ``which``; vectors are this rank's part of each."""

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
    trace: float | None = None  # of the matrix, where the solve came by it


@dataclass(frozen=True)
class LanczosProgress:
    """Where a solve stands after a product; ``state`` is live: keep ``state.clone()`` to go on from here."""

    products: int
    converged: int
    wanted: int
    worst_residual: float  # relative to its eigenvalue, over the wanted pairs so far
    state: LanczosState


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
    callback: Callable[[LanczosProgress], None] | None = None,
    state: LanczosState | None = None,
) -> Eigenpairs:
    """The ``k`` algebraically largest eigenpairs (``which="magnitude"``: largest in absolute value).

    A pair is converged when its residual is at most ``tol`` |lambda|, or at most 10 roundings of the largest
    |lambda| (what an eigenvalue of zero can reach). The solve ends when all are and a probe found nothing new
    (``probe``: products it may take, 0 for none), when what is left is the products' own noise, or after
    ``max_products`` (default 10 (2 k + 16)). Pairs that did not converge are returned and marked, never called
    converged.

    ``max_basis`` (default 2 k + 16, at most P) bounds the vectors held, but for 7 more (and k at the end,
    when no product runs). Residuals are those of the projected problem, at no cost: right for products good
    to rounding, but of the noise of low-precision products they see only what falls into the basis.
    ``true_residuals`` measures them by ``k`` products more. ``state``, taken from a callback of the same
    solve, goes on from there and is used up.

    Residual estimates below about 1e-8 of the largest |lambda| are not exact after a breakdown (repeated eigenvalues).

    Raises UsageError for a ``k`` outside 1..P or a setting that cannot work, and RunFailedError for a product
    that is not finite.

    Examples:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from nostalgia.linalg.vector_space import VectorSpace
        >>> values = torch.arange(1.0, 51.0)
        >>> diagonal = SimpleNamespace(space=VectorSpace.of({"w": values}), matvec=lambda v: values * v)
        >>> pairs = lanczos(diagonal, k=3, tol=1e-6)
        >>> [round(float(value), 4) for value in pairs.eigenvalues], bool(pairs.converged.all())
        ([50.0, 49.0, 48.0], True)
    """
    size = operator.space.size
    if not 1 <= k <= size:
        raise UsageError(f"top_k={k}: allowed is 1 to {size}, the number of parameters the curvature is over")
    if which not in WHICH:
        raise UsageError(f"which={which!r}: allowed are {', '.join(WHICH)}")
    if not tol > 0:
        raise UsageError(f"tol={tol}: the tolerance on residuals must be positive")
    rows = min(2 * k + 16 if max_basis is None else max_basis, size)
    if rows < min(k + 2, size):
        raise UsageError(f"max_basis={rows} is too small for top_k={k}: allowed is {k + 2} or more")
    limit = 10 * (2 * k + 16) if max_products is None else max_products
    if limit < k:
        raise UsageError(f"max_products={limit} is too small for top_k={k}: allowed is {k} or more")
    if state is not None and state.basis.shape[1:] != (operator.space.local_size,):
        raise UsageError(
            f"a Lanczos state of vectors of {state.basis.shape[1]} numbers; this rank's have "
            f"{operator.space.local_size}: resume with the parameters and ranks it was made with"
        )
    solve = _Solve(Krylov(operator, rows, seed, state), k, tol, limit, rows, which, probe)
    ritz = solve.run(callback)
    return solve.result(ritz, true_residuals)


@dataclass
class _Solve:
    """When to go on, from which vector, and when to stop."""

    krylov: Krylov
    k: int
    tol: float
    max_products: int
    max_basis: int
    which: str
    probe: int

    def __post_init__(self) -> None:
        self._clock, self._traffic = time.perf_counter(), self.krylov.space.traffic.snapshot()

    def run(self, callback: Callable[[LanczosProgress], None] | None) -> Ritz:
        """Products until the end; whatever is decided between two of them follows from the state alone."""
        krylov, state = self.krylov, self.krylov.state
        ritz = krylov.ritz(self.which)
        while state.products < self.max_products and not self._finished(ritz):
            self._turn(ritz)
            if krylov.m >= self.max_basis:
                krylov.restart(ritz, min(self.k + (self.max_basis - self.k) // 2, self.max_basis - 1))
                state.probe_chain = None
            krylov.expand()
            if state.probe_chain is not None:
                state.probe_chain = torch.cat([state.probe_chain, krylov.recurrence()])
            ritz = krylov.ritz(self.which)
            self._count_costs()
            if callback is not None:
                callback(self._progress(ritz))
        return ritz

    def _count_costs(self) -> None:
        """Add time and traffic since the last count to the state, so that a solve that goes on reports all its parts."""
        state, now, traffic = self.krylov.state, time.perf_counter(), self.krylov.space.traffic.snapshot()
        moved = traffic.since(self._traffic)
        state.seconds += now - self._clock
        state.collectives += moved.large + moved.small
        state.bytes_moved += moved.bytes
        self._clock, self._traffic = now, traffic

    def result(self, ritz: Ritz, true_residuals: bool) -> Eigenpairs:
        krylov, space, k = self.krylov, self.krylov.space, self.k
        vectors = space.combine_(ritz.vectors[:, :k].T, krylov.state.basis[: krylov.m])
        vectors = polish_(vectors, space).clone()
        # An eigenvector's sign is arbitrary: fix it by the seed, so that it does not turn on rounding.
        signs = space.gram(vectors, space.randn(krylov.seed)[None]).sign().to(vectors.dtype)
        vectors *= torch.where(signs == 0, 1.0, signs)
        values, residuals = ritz.values[:k].clone(), ritz.residuals[:k].clone()
        if true_residuals:
            residuals = self._true_residuals(vectors, values)
        self._count_costs()
        return Eigenpairs(
            eigenvalues=values,
            eigenvectors=vectors,
            residuals=residuals,
            converged=residuals <= self._allowed(ritz)[:k],
            products=krylov.state.products,
            collectives=krylov.state.collectives,
            bytes_moved=krylov.state.bytes_moved,
            seconds=krylov.state.seconds,
            tol=self.tol,
            space=space,
        )

    def _allowed(self, ritz: Ritz) -> Tensor:
        """The largest residual (m,) with which each pair is converged."""
        return (self.tol * ritz.values.abs()).clamp_min(self._floor(ritz))

    def _floor(self, ritz: Ritz) -> float:
        largest = float(ritz.values.abs().max()) if len(ritz.values) else 0.0
        return FLOOR * self.krylov.epsilon * largest

    def _finished(self, ritz: Ritz) -> bool:
        k, state, krylov = self.k, self.krylov.state, self.krylov
        if krylov.exhausted:
            return True
        if krylov.m < k:
            return False
        allowed = self._allowed(ritz)[:k]
        values, residuals, noise = ritz.values[:k], ritz.residuals[:k], ritz.noise[:k]
        converged = residuals <= allowed
        if not bool(converged.all()):
            hopeless = (noise > allowed) & (ritz.coupling[:k] <= noise)
            return bool((converged | hopeless).all())
        if self.probe == 0:
            return True
        if state.products < state.probe_end and not self._seen_enough(float(values[-1])):
            return False
        if state.probe_values is not None and state.probe_residuals is not None:
            moved = (values - state.probe_values).abs()
            if bool((moved <= residuals + state.probe_residuals + self._floor(ritz)).all()):
                return True
        self._start_probe(ritz)
        return False

    def _start_probe(self, ritz: Ritz) -> None:
        krylov, state = self.krylov, self.krylov.state
        # Once a probe has found a copy there may be more: look twice as long.
        first = state.probe_values is None
        state.probe_end = state.products + self.probe * (1 if first else 2)
        state.probe_values, state.probe_residuals = ritz.values[: self.k], ritz.residuals[: self.k]
        # Room for the whole probe, if there can be: a restart in the middle would cut its recurrence.
        if krylov.m > self.max_basis - self.probe > self.k:
            krylov.restart(ritz, self.max_basis - self.probe)
            ritz = krylov.ritz(self.which)
        krylov.park(ritz, self.k)
        krylov.add_random()
        state.probe_chain = torch.zeros(0, 2, dtype=torch.float64) if first else None

    def _seen_enough(self, last: float) -> bool:
        """Whether a copy of the wanted eigenvalues, of which ``last`` is the least, would have shown in the probe."""
        chain, krylov = self.krylov.state.probe_chain, self.krylov
        if chain is None or 2 * len(chain) < self.probe or float(chain[:, 1].min()) <= 0.0:
            return False
        within = torch.diag(chain[:, 0]) + torch.diag(chain[:-1, 1], 1) + torch.diag(chain[:-1, 1], -1)
        seen = torch.linalg.eigvalsh(within)
        outside = [last] if self.which == "largest" else [abs(last), -abs(last)]
        if float(seen[-1]) >= outside[0] or (len(outside) > 1 and float(seen[0]) <= outside[1]):
            return False
        weight = max(_largest_weight(chain, value) for value in outside)
        return (2 * krylov.space.size * weight / math.pi) ** 0.5 <= MISSED

    def _turn(self, ritz: Ritz) -> None:
        """See to it that a row is active, and that it is what the pairs not converged yet lack most."""
        krylov = self.krylov
        not_yet = ritz.residuals[: self.k] > self._allowed(ritz)[: self.k]
        if len(krylov.state.parked) and bool(not_yet.any()):
            strengths = krylov.strengths(ritz.vectors[:, : self.k][:, not_yet])
            strongest = int(strengths.argmax())
            if not krylov.active:
                self._unpark(strongest)
            elif float(strengths[strongest]) > 2 * float(strengths[0]):
                self._unpark(strongest - 1)
        if not krylov.active:
            krylov.state.probe_chain = None
            krylov.add_random()

    def _unpark(self, index: int) -> None:
        self.krylov.state.probe_chain = None  # products of another row do not belong to it
        self.krylov.unpark(index)

    def _progress(self, ritz: Ritz) -> LanczosProgress:
        values, residuals = ritz.values[: self.k], ritz.residuals[: self.k]
        relative = residuals / values.abs().clamp_min(torch.finfo(torch.float64).tiny)
        return LanczosProgress(
            products=self.krylov.state.products,
            converged=int((residuals <= self._allowed(ritz)[: self.k]).sum()),
            wanted=self.k,
            worst_residual=float(relative.max()),
            state=self.krylov.state,
        )

    def _true_residuals(self, vectors: Tensor, values: Tensor) -> Tensor:
        krylov, space = self.krylov, self.krylov.space
        squares = torch.zeros(len(values), dtype=torch.float64, device=space.device)
        for i, (vector, value) in enumerate(zip(vectors, values.tolist(), strict=True)):
            error = (krylov.operator.matvec(vector) - value * vector)[None]
            krylov.state.products += 1
            squares[i] = space.local_gram(error, error)[0, 0]
        return space.all_reduce(squares).clamp_min(0.0).sqrt().cpu()


def _largest_weight(chain: Tensor, value: float) -> float:
    """The most that a starting vector with the recurrence ``chain`` (j, 2) can have of an eigenvalue ``value``."""
    before, current, total, beta = 0.0, 1.0, 1.0, 0.0
    for diagonal, following in chain.tolist():
        before, current = current, ((value - diagonal) * current - beta * before) / following
        beta, total = following, total + current * current
    return 1.0 / total
