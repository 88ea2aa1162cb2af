"""The orthonormal basis of a Lanczos solve, and what is known of the operator on it.

Rows V (m, P) have had their product. The *active* row a, orthonormal to them, is the next to have it.
*Parked* rows U (p, P), orthogonal to V and a but neither unit nor orthogonal to each other, hold what the
solve turned away from: new rows need not be orthogonal to them, so they hide nothing. With T = V A V^T,

    A V^T = V^T (T + D) + a^T c + U^T C + lost,

where D is how far products contradict the symmetry of A (rounding, or noise of a low precision), and of what
restarts cut off only the Gram matrix G is kept. So the Ritz pair (theta, y = V^T s) of T s = theta s has the
residual

    |A y - theta y| <= |a^T c s + U^T C s| + |D s| + (s^T G s)^(1/2),

up to the rounding of the vectors, for which one rounding of |A| is added. Without parked rows this is the
Lanczos recurrence in its thick-restart form (Wu and Simon 2000).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nostalgia.errors import RunFailedError
from nostalgia.linalg.vector_space import VectorSpace

MAX_PARKED = 4
# A remainder below this many roundings of the product it is left of has no direction of its own.
BREAKDOWN = 10.0


class Operator(Protocol):
    """A symmetric linear operator on the vectors of ``space``."""

    @property
    def space(self) -> VectorSpace: ...

    def matvec(self, v: Tensor) -> Tensor: ...


def _none(rows: int = 0) -> Tensor:
    return torch.zeros(rows, 0, dtype=torch.float64)


@dataclass
class LanczosState:
    """All of a solve between two products: going on from it is, to the bit, going on as if never stopped."""

    basis: Tensor  # (rows, P_local): V, then a if there is one, then room to grow
    parked: Tensor  # U (p, P_local)
    projected: Tensor  # T (m, m) float64, CPU, as all below
    deviation: Tensor  # D (m, m)
    lost: Tensor  # G (m, m)
    active_coupling: Tensor  # c (1, m); (0, m) where no row is active
    parked_coupling: Tensor  # C (p, m)
    parked_gram: Tensor  # U U^T (p, p)
    products: int = 0
    draws: int = 0  # random vectors drawn
    scale: float = 0.0  # largest |A v| seen: a lower bound of |A|
    probe_end: int = 0  # products at which a running probe ends; 0: none was started
    probe_values: Tensor | None = None  # (k,) Ritz values when it started
    probe_residuals: Tensor | None = None  # (k,)
    probe_chain: Tensor | None = None  # (j, 2): recurrence of the probe's j products; None: not followed
    seconds: float = 0.0  # spent so far, over all parts of a solve that was broken off
    collectives: int = 0
    bytes_moved: int = 0

    @property
    def rows(self) -> int:
        """Rows of ``basis`` in use."""
        return self.projected.shape[0] + self.active_coupling.shape[0]

    def clone(self) -> LanczosState:
        """A copy that later products leave alone, without the room to grow."""
        # The small matrices are replaced by a solve, never written to.
        return LanczosState(**{**vars(self), "basis": self.basis[: self.rows].clone(), "parked": self.parked.clone()})


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs of a basis, best first."""

    values: Tensor  # (m,) float64, CPU, as all below
    vectors: Tensor  # (m, m), columns s
    coupling: Tensor  # (m,) |a^T c s + U^T C s|: what further products reduce
    noise: Tensor  # (m,) |D s| + (s^T G s)^(1/2) + rounding: what they cannot

    @property
    def residuals(self) -> Tensor:
        return self.coupling + self.noise


class Krylov:
    """Grows and compresses the basis of ``state``: ``rows`` vectors with a product, and a few besides."""

    def __init__(self, operator: Operator, rows: int, seed: int, state: LanczosState | None) -> None:
        self.operator, self.space, self.seed = operator, operator.space, seed
        self.epsilon = torch.finfo(self.space.dtype).eps
        room = rows + 2  # the active row, and the product
        if state is None:
            blocks = self.space.zeros(room), self.space.zeros(0)
            state = LanczosState(*blocks, _none(), _none(), _none(), _none(), _none(), _none())
        elif state.basis.shape[0] < room:
            basis = self.space.zeros(room)
            basis[: state.basis.shape[0]] = state.basis
            state.basis = basis
        self.state = state

    @property
    def m(self) -> int:
        return self.state.projected.shape[0]

    @property
    def active(self) -> bool:
        return self.state.active_coupling.shape[0] > 0

    @property
    def exhausted(self) -> bool:
        """Whether V spans all of R^P: the projected problem is the whole problem."""
        return self.m >= self.space.size

    def ritz(self, which: str) -> Ritz:
        s = self.state
        values, vectors = torch.linalg.eigh(s.projected)
        order = (values if which == "largest" else values.abs()).argsort(descending=True, stable=True)
        values, vectors = values[order], vectors[:, order]
        parked = s.parked_coupling @ vectors
        squared = (s.active_coupling @ vectors).square().sum(0) + (parked * (s.parked_gram @ parked)).sum(0)
        noise = (s.deviation @ vectors).norm(dim=0) + self.epsilon * s.scale
        noise += ((s.lost @ vectors) * vectors).sum(0).clamp_min(0.0).sqrt()
        return Ritz(values, vectors, squared.clamp_min(0.0).sqrt(), noise)

    def strengths(self, vectors: Tensor) -> Tensor:
        """How much the Ritz vectors s (m, j) couple to each row: (a, then U) of this rank's 1 + p or p."""
        s = self.state
        active = (s.active_coupling @ vectors).norm(dim=1)
        lengths = s.parked_gram.diagonal().clamp_min(0.0).sqrt()
        return torch.cat([active, (s.parked_coupling @ vectors).norm(dim=1) * lengths])

    # -- the active row ------------------------------------------------------------------------------------

    def expand(self) -> None:
        """Multiply the active row; what of its product lies outside the basis, if anything, is active next.

        Two small all-reduces (three where cancellation asks for it). Raises RunFailedError for a product that
        is not finite.
        """
        s, m = self.state, self.m
        s.basis[m + 1] = self.operator.matvec(s.basis[m])
        s.products += 1
        column, beta, overlaps = self._orthogonalise(m + 1, is_product=True)
        # Measured against what was known of A v_i along v_m: they differ by what broke the symmetry.
        deviation = torch.cat([s.deviation, s.active_coupling - column[None, :m]])
        s.deviation = torch.cat([deviation, torch.zeros(m + 1, 1, dtype=torch.float64)], dim=1)
        s.projected = torch.cat([torch.cat([s.projected, column[None, :m]]), column[:, None]], dim=1)
        s.lost = torch.nn.functional.pad(s.lost, (0, 1, 0, 1))
        s.parked_coupling = torch.nn.functional.pad(s.parked_coupling, (0, 1))
        s.active_coupling = torch.zeros(0, m + 1, dtype=torch.float64)
        if beta > 0.0 and not self.exhausted:
            coupling = torch.zeros(m + 1, dtype=torch.float64)
            coupling[m] = beta
            self._activate(coupling, overlaps)

    def add_random(self) -> None:
        """A random vector orthogonal to V becomes active; none may be, and V must not span R^P."""
        s, m = self.state, self.m
        s.draws += 1
        s.basis[m] = self.space.randn((self.seed << 20) + s.draws)
        _, _, overlaps = self._orthogonalise(m)
        self._activate(torch.zeros(m, dtype=torch.float64), overlaps)

    def park(self, ritz: Ritz, wanted: int) -> None:
        """Turn away from the active row, if there is one. Beyond MAX_PARKED the row needed least is lost.

        Ritz vectors besides the ``wanted`` ones, which may need it more, are given up before.
        """
        s = self.state
        if not self.active:
            return
        if len(s.parked) == MAX_PARKED:
            self.restart(ritz, wanted)
        self._append_parked()
        if len(s.parked) > MAX_PARKED:
            weakest = int(self.strengths(torch.eye(self.m, dtype=torch.float64)).argmin())
            c = s.parked_coupling[weakest]
            s.lost = s.lost + torch.outer(c, c) * s.parked_gram[weakest, weakest]
            self._remove_parked(weakest)

    def unpark(self, index: int) -> None:
        """Make parked row ``index`` the active one, and park the active one in its place."""
        s, m = self.state, self.m
        if self.active:
            self._append_parked()
        s.basis[m] = s.parked[index]
        coupling = s.parked_coupling[index]
        self._remove_parked(index)
        _, length, overlaps = self._orthogonalise(m)
        if length > 0.0:
            self._activate(coupling * length, overlaps)

    def recurrence(self) -> Tensor:
        """Diagonal and next off-diagonal entry (1, 2) of the recurrence in the last product."""
        s = self.state
        coupling = s.active_coupling[0, -1] if self.active else torch.zeros((), dtype=torch.float64)
        return torch.stack([s.projected[-1, -1], coupling])[None]

    # -- the whole basis -----------------------------------------------------------------------------------

    def restart(self, ritz: Ritz, keep: int) -> None:
        """Compress V to its first ``keep`` Ritz vectors, in place; the other rows stay."""
        s, m = self.state, self.m
        kept, cut = ritz.vectors[:, :keep], ritz.vectors[:, keep:]
        away = cut.T @ s.deviation @ kept
        s.lost = kept.T @ s.lost @ kept + away.T @ away
        s.deviation = kept.T @ s.deviation @ kept
        s.projected = torch.diag(ritz.values[:keep])
        s.active_coupling, s.parked_coupling = s.active_coupling @ kept, s.parked_coupling @ kept
        self.space.combine_(kept.T, s.basis[:m])
        if self.active:
            s.basis[keep] = s.basis[m]

    # -- inside --------------------------------------------------------------------------------------------

    def _activate(self, coupling: Tensor, overlaps: Tensor) -> None:
        """Row m, orthonormal to V, becomes active. Parked rows give up what of them lies along it."""
        s, row = self.state, self.state.basis[self.m]
        s.active_coupling = (coupling + overlaps @ s.parked_coupling)[None]
        s.parked_gram = s.parked_gram - torch.outer(overlaps, overlaps)
        for parked, overlap in zip(s.parked, overlaps.tolist(), strict=True):
            parked.sub_(row, alpha=overlap)

    def _append_parked(self) -> None:
        s = self.state
        s.parked = torch.cat([s.parked, s.basis[self.m, None]])
        s.parked_coupling = torch.cat([s.parked_coupling, s.active_coupling])
        s.parked_gram = torch.nn.functional.pad(s.parked_gram, (0, 1, 0, 1))
        s.parked_gram[-1, -1] = 1.0
        s.active_coupling = torch.zeros(0, self.m, dtype=torch.float64)

    def _remove_parked(self, index: int) -> None:
        s = self.state
        others = [i for i in range(len(s.parked)) if i != index]
        s.parked, s.parked_coupling = s.parked[others], s.parked_coupling[others]
        s.parked_gram = s.parked_gram[others][:, others]

    def _orthogonalise(self, n: int, *, is_product: bool = False) -> tuple[Tensor, float, Tensor]:
        """Make row n orthonormal to the n rows before it by classical Gram-Schmidt on all of them at once.

        Products twice, anything else as often as cancellation asks for. Returns the coefficients removed
        (n,), the length left (0.0: nothing but rounding, no direction) and the unit row's overlaps with
        the parked rows (p,). One small all-reduce a pass brings all of these.
        """
        s, space = self.state, self.space
        total, overlaps = torch.zeros(n, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        for step in range(3):
            row = s.basis[n : n + 1]
            parts = [space.local_gram(s.basis[: n + 1], row), space.local_gram(s.parked, row)]
            inner = space.all_reduce(torch.cat(parts)[:, 0]).cpu()
            removed, length, overlaps = inner[:n], float(inner[n].clamp_min(0.0).sqrt()), inner[n + 1 :]
            if not bool(torch.isfinite(inner).all()):
                raise RunFailedError(
                    f"product {s.products} of the eigensolve is not finite: the loss or its second "
                    "derivative overflows at these parameters; see whether the loss is finite, and try "
                    "curvature.precision=float64"
                )
            if is_product and step == 0:
                s.scale = max(s.scale, length)
            if is_product and length <= BREAKDOWN * self.epsilon * s.scale:
                return total, 0.0, overlaps
            s.basis[n] -= space.combine(removed[None], s.basis[:n])[0]
            total += removed
            # By Pythagoras, which is exact enough where a pass removes little.
            left = float((inner[n] - removed @ removed).clamp_min(0.0).sqrt())
            if left > 0.7 * length and (step > 0 or n == 0 or not is_product):
                s.basis[n] /= left
                return total, left, overlaps / left
        return total, 0.0, overlaps
