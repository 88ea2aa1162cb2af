"""The orthonormal basis of a Lanczos solve, and what is known of the operator on it.

Rows V (m, P) have had their product, rows U (q, P) wait for theirs ("pending"). With [V; U] orthonormal and T
symmetric,

    A V^T = V^T (T + D) + U^T C + lost,

where T = V A V^T, C couples to the pending rows, D is how far products contradict the symmetry of A (rounding, or
noise of a low precision), and of what restarts cut off only the Gram matrix G is kept. So the Ritz pair
(theta, y = V^T s) of T s = theta s has the residual

    |A y - theta y| <= |C s| + |D s| + (s^T G s)^(1/2),

up to the rounding of the vectors, for which one rounding of |A| is added. One pending row makes this the usual Lanczos recurrence in its
thick-restart form (Wu and Simon 2000); more of them, a block method that takes one product at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nostalgia.errors import RunFailedError
from nostalgia.linalg.vector_space import VectorSpace

MAX_PENDING = 4
# A remainder below this many roundings of the product it is left of has no direction of its own.
BREAKDOWN = 10.0


class Operator(Protocol):
    """A symmetric linear operator on the vectors of ``space``."""

    space: VectorSpace

    def matvec(self, v: Tensor) -> Tensor: ...


def _empty(rows: int) -> Tensor:
    return torch.zeros(rows, 0, dtype=torch.float64)


@dataclass
class LanczosState:
    """All of a solve between two products: going on from it is, bit for bit, going on as if never stopped."""

    basis: Tensor  # (rows, P_local): V, then U, then room to grow
    projected: Tensor  # T (m, m) float64, CPU, as all below
    deviation: Tensor  # D (m, m)
    lost: Tensor  # G (m, m)
    coupling: Tensor  # C (q, m)
    products: int = 0
    draws: int = 0  # random vectors drawn
    scale: float = 0.0  # largest |A v| seen: a lower bound of |A|
    probe_end: int = 0  # products at which a running probe ends; 0: none was started
    probe_values: Tensor | None = None  # (k,) Ritz values when it started
    probe_residuals: Tensor | None = None  # (k,)

    @property
    def rows(self) -> int:
        """m + q: the rows of ``basis`` in use."""
        return self.projected.shape[0] + self.coupling.shape[0]

    def clone(self) -> LanczosState:
        """A copy that later products leave alone, without the room to grow."""
        copy = LanczosState(**{**vars(self), "basis": self.basis[: self.rows].clone()})
        return copy  # the small matrices are replaced, never written to


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs of a basis, best first."""

    values: Tensor  # (m,) float64, CPU, as all below
    vectors: Tensor  # (m, m), columns s
    coupling: Tensor  # (m,) |C s|: what further products reduce
    noise: Tensor  # (m,) |D s| + (s^T G s)^(1/2) + eps |A|: what they cannot

    @property
    def residuals(self) -> Tensor:
        return self.coupling + self.noise


class Krylov:
    """Grows and compresses the basis of ``state``; at most ``rows`` vectors with a product, a few without."""

    def __init__(self, operator: Operator, rows: int, seed: int, state: LanczosState | None) -> None:
        self.operator, self.space, self.seed = operator, operator.space, seed
        self.epsilon = torch.finfo(self.space.dtype).eps
        room = rows + MAX_PENDING + 1  # the last row takes the product
        if state is None:
            state = LanczosState(self.space.zeros(room), _empty(0), _empty(0), _empty(0), _empty(0))
        elif state.basis.shape[0] < room:
            basis = self.space.zeros(room)
            basis[: state.rows] = state.basis[: state.rows]
            state.basis = basis
        self.state = state

    @property
    def m(self) -> int:
        return self.state.projected.shape[0]

    @property
    def pending(self) -> int:
        return self.state.coupling.shape[0]

    @property
    def exhausted(self) -> bool:
        """Whether V spans all of R^P: the projected problem is the whole problem."""
        return self.m >= self.space.size

    def ritz(self, which: str) -> Ritz:
        s = self.state
        values, vectors = torch.linalg.eigh(s.projected)
        order = (values if which == "largest" else values.abs()).argsort(descending=True, stable=True)
        values, vectors = values[order], vectors[:, order]
        noise = (s.deviation @ vectors).norm(dim=0) + self.epsilon * s.scale
        noise += ((s.lost @ vectors) * vectors).sum(0).clamp_min(0.0).sqrt()
        return Ritz(values, vectors, (s.coupling @ vectors).norm(dim=0), noise)

    def add_random(self) -> None:
        """A random unit vector orthogonal to all rows becomes the last pending one; rows must not span R^P."""
        s, n = self.state, self.state.rows
        s.draws += 1
        s.basis[n] = self.space.randn((self.seed << 20) + s.draws)
        _, _, length = self._orthogonalise(n)
        s.basis[n] /= length
        s.coupling = torch.cat([s.coupling, torch.zeros(1, self.m, dtype=torch.float64)])

    def expand(self, index: int) -> None:
        """Multiply pending row ``index`` and append what of the product is outside the basis, if anything is.

        Two small all-reduces (three where cancellation asks for it). Raises RunFailedError for a product that
        is not finite.
        """
        s, m, n = self.state, self.m, self.state.rows
        self._swap_pending(0, index)
        s.basis[n] = self.operator.matvec(s.basis[m])
        s.products += 1
        column, before, beta = self._orthogonalise(n)
        s.scale = max(s.scale, before)
        coupling = torch.cat([s.coupling[1:], column[m + 1 :, None]], dim=1)
        deviation = torch.cat([s.deviation, (s.coupling[0] - column[:m])[None]])
        s.deviation = torch.cat([deviation, torch.zeros(m + 1, 1, dtype=torch.float64)], dim=1)
        s.projected = torch.cat(
            [torch.cat([s.projected, column[None, :m]]), column[: m + 1, None]],
            dim=1,
        )
        s.lost = torch.nn.functional.pad(s.lost, (0, 1, 0, 1))
        s.coupling = coupling
        if n < self.space.size and beta > BREAKDOWN * self.epsilon * s.scale:
            s.basis[n] /= beta
            new = torch.zeros(1, m + 1, dtype=torch.float64)
            new[0, m] = beta
            s.coupling = torch.cat([coupling, new])

    def restart(self, ritz: Ritz, keep: int) -> None:
        """Compress V to its first ``keep`` Ritz vectors, in place; the pending rows stay."""
        s, m = self.state, self.m
        kept, cut = ritz.vectors[:, :keep], ritz.vectors[:, keep:]
        away = cut.T @ s.deviation @ kept
        s.lost = kept.T @ s.lost @ kept + away.T @ away
        s.deviation = kept.T @ s.deviation @ kept
        s.projected = torch.diag(ritz.values[:keep])
        s.coupling = s.coupling @ kept
        self.space.combine_(kept.T, s.basis[:m])
        for i in range(self.pending):
            s.basis[keep + i] = s.basis[m + i]

    def drop_pending(self, index: int) -> None:
        """Forget a pending row; what couples to it is lost, and counted as such."""
        s, last = self.state, self.pending - 1
        s.lost = s.lost + torch.outer(s.coupling[index], s.coupling[index])
        self._swap_pending(index, last)
        s.coupling = s.coupling[:last]

    def _swap_pending(self, i: int, j: int) -> None:
        if i == j:
            return
        s, m = self.state, self.m
        s.basis[m + i], s.basis[m + j] = s.basis[m + j].clone(), s.basis[m + i].clone()
        order = list(range(self.pending))
        order[i], order[j] = j, i
        s.coupling = s.coupling[order]

    def _orthogonalise(self, n: int) -> tuple[Tensor, float, float]:
        """Classical Gram-Schmidt, twice, of row n against the n rows before it, all of them at once.

        Returns the coefficients removed (n,), and the length before and after; 0.0 after where nothing but
        rounding is left. One small all-reduce a pass, which brings the length too.
        """
        basis, space = self.state.basis, self.space
        total = torch.zeros(n, dtype=torch.float64)
        before = after = 0.0
        for step in range(3):
            inner = space.gram(basis[: n + 1], basis[n : n + 1])[:, 0].cpu()
            if not bool(torch.isfinite(inner).all()):
                raise RunFailedError(
                    f"product {self.state.products} of the eigensolve is not finite: the loss or its second "
                    "derivative overflows at these parameters; see whether the loss is finite, and try "
                    "nostalgia.precision=float64"
                )
            removed, length = inner[:n], float(inner[n].clamp_min(0.0).sqrt())
            before = length if step == 0 else before
            basis[n] -= space.combine(removed[None], basis[:n])[0]
            total += removed
            # By Pythagoras; exact enough once a pass removes little.
            after = float((inner[n] - removed @ removed).clamp_min(0.0).sqrt())
            if n == 0 or (step >= 1 and after > 0.7 * length):
                return total, before, after
        return total, before, 0.0
