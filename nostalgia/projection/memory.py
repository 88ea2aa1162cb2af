"""The memory: orthonormal rows Q and eigenvalues that stand for the curvature of all finished tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nostalgia.errors import UsageError
from nostalgia.linalg.lanczos import Eigenpairs
from nostalgia.linalg.subspace import EIGENVALUE_TOL, merge_average, merge_union, merge_weighted
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.projection.placement import PLACEMENTS, BasisPlacement, place_basis

MERGES = ("union", "average", "ema")


@dataclass(frozen=True)
class MemoryUpdate:
    """What one finished task did to the memory."""

    added: int  # converged, positive pairs that were offered
    left_out: int  # pairs that did not converge or curve downwards
    dropped: int  # directions lost to the rank budget
    dropped_eigenvalue: float  # the largest eigenvalue among them, 0.0 if none
    columns: int  # rows of Q now


class CurvatureMemory:
    """Top eigenspaces of finished tasks, merged under a rank budget.

    ``merge="union"`` keeps the span of all tasks' eigenvectors, at most ``k_max`` of them (default 4 k);
    ``"average"`` keeps the running mean Hessian at rank ``k``, ``"ema"`` the moving mean (1 - eta) H + eta H_t with
    ``ema_share`` eta. ``basis`` is (m, P_local) in ``dtype``, in ``space``:
    the solver's own slices with ``placement="sharded"``, the whole vectors on every rank with ``"replicated"``.
    ``auto`` replicates where the fullest basis fits in ``budget_bytes`` (projection then needs no collective of size
    P); shards of FSDP2 are never replicated.

    Examples:
        >>> import torch
        >>> from nostalgia import HessianOperator, lanczos
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> memory = CurvatureMemory(k=1)
        >>> for row in torch.eye(3)[:2]:  # two tasks, a direction each
        ...     hessian = HessianOperator(model, lambda m, x: (m(x).square().sum(), len(x)), [row[None]])
        ...     _ = memory.update(lanczos(hessian, k=1))
        >>> memory.columns
        2
    """

    def __init__(
        self,
        k: int,
        merge: str = "union",
        k_max: int | None = None,
        *,
        placement: str = "auto",
        dtype: torch.dtype | None = None,
        budget_bytes: float | None = None,
        ema_share: float = 0.5,
    ) -> None:
        if k < 1:
            raise UsageError(f"k={k}: the memory needs at least one direction a task (k >= 1)")
        if merge not in MERGES:
            raise UsageError(f"merge={merge!r}: allowed are {', '.join(MERGES)}")
        if placement not in PLACEMENTS:
            raise UsageError(f"placement={placement!r}: allowed are {', '.join(PLACEMENTS)}")
        self.k, self.merge, self.k_max = k, merge, 4 * k if k_max is None else k_max
        if self.k_max < k:
            raise UsageError(f"k_max={self.k_max} is below k={k}; the memory must hold at least one task's directions")
        self.placement, self.dtype, self.budget_bytes = placement, dtype, budget_bytes
        self.ema_share = ema_share
        self._placed: tuple[VectorSpace, BasisPlacement] | None = None
        self.tasks = 0
        self.space: VectorSpace | None = None
        self.basis: Tensor | None = None  # (m, P_local)
        self.eigenvalues = torch.zeros(0, dtype=torch.float64)  # (m,), decreasing

    @property
    def columns(self) -> int:
        return 0 if self.basis is None else self.basis.shape[0]

    @property
    def capacity(self) -> int:
        """The most rows the basis may ever have."""
        return self.k_max if self.merge == "union" else self.k

    def place(self, space: VectorSpace) -> BasisPlacement:
        """Where the basis of ``space`` will lie, from the first task to the last; all ranks must ask together."""
        if self._placed is None or self._placed[0] is not space:
            itemsize = torch.empty((), dtype=self.dtype or space.dtype).element_size()
            decision = place_basis(self.placement, space, min(self.capacity, space.size), itemsize, self.budget_bytes)
            self._placed = (space, decision)
        return self._placed[1]

    @torch.no_grad()
    def update(self, eigenpairs: Eigenpairs) -> MemoryUpdate:
        """Merge a finished task's eigenpairs: the converged ones with an eigenvalue above the noise of their own solve."""
        self.tasks += 1
        space = eigenpairs.space
        noise = EIGENVALUE_TOL * eigenpairs.eigenvalues.cpu().amax().clamp_min(0.0)
        keep = eigenpairs.converged.cpu() & (eigenpairs.eigenvalues.cpu() > noise)
        values = eigenpairs.eigenvalues.cpu()[keep]
        vectors = eigenpairs.eigenvectors[keep.to(eigenpairs.eigenvectors.device)]
        previous = self._in_space(space)
        if self.merge == "union":
            merged = merge_union([*previous, (vectors, values)], self.k_max, space)
        else:
            old_basis, old_values = previous[0] if previous else (space.zeros(0), torch.zeros(0, dtype=torch.float64))
            if self.merge == "average":
                merged = merge_average(old_basis, old_values, vectors, values, self.tasks, self.k, space)
            else:
                share = self.ema_share if previous else 1.0
                merged = merge_weighted(old_basis, old_values, vectors, values, share, self.k, space)
        self._store(merged.basis, merged.eigenvalues, space)
        dropped = merged.dropped_eigenvalues
        return MemoryUpdate(
            added=int(keep.sum()),
            left_out=int((~keep).sum()),
            dropped=len(dropped),
            dropped_eigenvalue=float(dropped.max()) if len(dropped) else 0.0,
            columns=self.columns,
        )

    def check_layout(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise UsageError unless ``parameters`` have the shapes, in order, that the basis was computed with."""
        assert self.space is not None
        shapes = [tuple(p.shape) for p in parameters.values()]
        if shapes == [tuple(shape) for shape in self.space.shapes]:
            return
        raise UsageError(
            f"the memory was computed for {len(self.space.shapes)} parameters with {self.space.size} numbers, "
            f"{len(shapes)} parameters with {sum(p.numel() for p in parameters.values())} were given: "
            "pass the same parameters in the same order"
        )

    def inverse_gram(self) -> Tensor | None:
        """(Q Q^T)^-1 (m, m) in float64 where the rows are stored with less than float32, else None."""
        if self.basis is None or self.basis.dtype in (torch.float32, torch.float64):
            return None
        assert self.space is not None
        return torch.linalg.inv(self.space.gram(self.basis, self.basis, exact=True))

    def bytes_per_rank(self) -> int:
        return 0 if self.basis is None else self.basis.numel() * self.basis.element_size()

    def describe(self) -> dict[str, Any]:
        """Where and how the basis is held, for the run's files."""
        if self.basis is None or self._placed is None:
            return {"columns": 0, "bytes_per_rank": 0}
        decision = self._placed[1]
        return {
            "columns": self.columns,
            "bytes_per_rank": self.bytes_per_rank(),
            "dtype": str(self.basis.dtype).removeprefix("torch."),
            "placement": decision.name,
            "reason": decision.reason,
        }

    @torch.no_grad()
    def load(self, basis: Tensor, eigenvalues: Tensor, tasks: int, space: VectorSpace) -> None:
        """Take up a saved memory: ``basis`` (m, P_local) in ``space``, on any number of ranks and any placement."""
        if basis.shape != (len(eigenvalues), space.local_size):
            raise UsageError(
                f"a basis of shape {tuple(basis.shape)} with {len(eigenvalues)} eigenvalues does not fit "
                f"vectors of {space.local_size} numbers"
            )
        self.tasks = tasks
        self._store(basis, eigenvalues.double().cpu(), space)

    def _in_space(self, space: VectorSpace) -> list[tuple[Tensor, Tensor]]:
        """What is held, as vectors of the solver's ``space``: nothing or one (basis, eigenvalues)."""
        if self.basis is None or self.space is None:
            return []
        same = self.space.placement == space.placement
        basis = self.basis if same else space.slice_flat(self.basis)
        return [(basis.to(space.dtype), self.eigenvalues)]

    def _store(self, basis: Tensor, eigenvalues: Tensor, space: VectorSpace) -> None:
        dtype = space.dtype if self.dtype is None else self.dtype
        if basis.shape[0] == 0:
            self.basis, self.space = None, None
        elif self.place(space).replicated:
            self.space = space.replicated()
            self.basis = space.gather_flat(basis.to(dtype)).contiguous()
        else:
            self.space, self.basis = space, basis.to(dtype).contiguous()
        self.eigenvalues = eigenvalues
