"""The top eigenpairs of a finished task's curvature, by a solve that can be broken off and gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nostalgia.curvature.eigenspace import CurvatureOptions, gradient_rows, task_operator, top_eigenpairs
from nostalgia.curvature.rows import eigenpairs_of_rows
from nostalgia.errors import RunFailedError, UsageError
from nostalgia.linalg.block import Block
from nostalgia.linalg.lanczos import Eigenpairs, LanczosProgress, LanczosState
from nostalgia.linalg.restricted import Restricted
from nostalgia.linalg.subspace import polish_
from nostalgia.methods.base import TaskContext

VECTORS = ("basis", "parked")


class Eigensolver:
    """Solves for a task's eigenpairs; its state goes into the state of the method that has it."""

    def __init__(self) -> None:
        self.unfinished: LanczosState | None = None

    def solve(self, task: TaskContext, k: int) -> Eigenpairs:
        """The ``k`` largest eigenpairs, going on with what `load_state_dict` took up; all ranks call it.

        By rows (`CurvatureOptions.takes_rows`) one pass over the samples, without a state: one that is broken off begins again.
        Raises RunFailedError where no pair converged.
        """
        options, mask = task.curvature, task.first_order_mask()
        batches = task.samples(options.num_samples, options.batch_size)
        if options.takes_rows(task.space):
            rows = gradient_rows(
                task.model, task.objective, batches, task.parameters, task.accelerator, options, task.space
            )
            pairs = eigenpairs_of_rows(rows, k, tol=options.tol, budget_bytes=options.rows_budget_bytes, mask=mask)
            return _some_converged(
                pairs, task, f"in {options.rows_budget_bytes} bytes of rows; raise curvature.rows_budget_bytes"
            )
        operator = task_operator(
            task.model, task.objective, batches, task.parameters, task.accelerator, options, task.space
        )

        def follow(progress: LanczosProgress) -> None:
            self.unfinished = progress.state
            task.pause(progress.products, progress.converged, k)

        state, self.unfinished = self.unfinished, None
        pairs = top_eigenpairs(operator if mask is None else Restricted(operator, mask), k, options, follow, state)
        self.unfinished = None
        if mask is not None:  # the first vector of the solve is random in all coordinates
            pairs = replace(pairs, eigenvectors=polish_(pairs.eigenvectors * mask, task.space))
        how = f"in {pairs.products} products; raise curvature.max_products or curvature.tol"
        return _some_converged(pairs, task, how)

    def state_dict(self, task: TaskContext | None) -> dict[str, Any] | None:
        if self.unfinished is None or task is None:
            return None
        solve = self.unfinished
        small = {key: value for key, value in vars(solve).items() if key not in VECTORS}
        # Views, written before the solve goes on: of a whole network the basis is most of a device's memory.
        vectors = {"basis": solve.basis[: solve.rows], "parked": solve.parked}
        return {**{key: Block(rows, task.space) for key, rows in vectors.items()}, **small}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        if state is None:
            self.unfinished = None
            return
        taken: dict[str, Any] = {}
        for key, item in state.items():
            taken[key] = item.rows if isinstance(item, Block) else item.cpu() if isinstance(item, Tensor) else item
        self.unfinished = LanczosState(**taken)


def _some_converged(pairs: Eigenpairs, task: TaskContext, how: str) -> Eigenpairs:
    """The pairs; raises RunFailedError where none converged."""
    if bool(pairs.converged.any()):
        return pairs
    raise RunFailedError(
        f"{task.tasks[-1].name}: none of {len(pairs.eigenvalues)} eigenpairs converged {how}, or use "
        f"curvature.precision=float64 (worst residual {float(pairs.residuals.max()):.2g})"
    )


def check_eigensolve(k: int, options: CurvatureOptions, key: str = "method.top_k") -> None:
    """Raise UsageError for limits under which the ``k`` pairs that ``key`` asks for cannot be found."""
    for name, value, least in (("max_basis", options.max_basis, k + 2), ("max_products", options.max_products, k)):
        if value is not None and value < least:
            raise UsageError(f"curvature.{name}={value}: allowed with {key}={k} is {least} or more")


def unconverged_note(pairs: Eigenpairs) -> str:
    """One line on the pairs that did not converge and are left out; empty where all did."""
    missed = (~pairs.converged).nonzero().flatten().tolist()
    if not missed:
        return ""
    how = f"in {pairs.products} products" if pairs.products else "within curvature.rows_budget_bytes"
    worst = max(float(pairs.residuals[i] / pairs.eigenvalues[i].abs().clamp_min(1e-300)) for i in missed)
    return (
        f"eigenpairs {', '.join(str(i + 1) for i in missed)} did not converge {how} (worst "
        f"relative {worst:.2g}, tol {pairs.tol:g}); they are left out"
    )
