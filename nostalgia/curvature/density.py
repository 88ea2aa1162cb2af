"""Spectral density and trace of the curvature, estimated by random vectors.

hessian-eigenthings' stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017) and Hutchinson trace, on our operators:
vectors spread over ranks, the same numbers on each rank whatever their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hessian_eigenthings.algorithms.spectral_density import spectral_density
from hessian_eigenthings.algorithms.trace import trace
from torch import Tensor

from nostalgia.curvature.base import BatchedOperator
from nostalgia.linalg.backend import SpaceBackend

GRID_POINTS = 1000


@dataclass(frozen=True)
class SpectrumEstimate:
    """``density`` (G,) integrates to 1 over ``grid`` (G,), eigenvalues smoothed by a Gaussian of width ``sigma``."""

    grid: Tensor
    density: Tensor
    sigma: float
    trace: float
    trace_error: float  # standard error of `trace` over its random vectors; nan for one
    products: int

    def to_json(self) -> dict[str, Any]:
        """As it stands in a task's curvature file."""
        return {
            "density": {"grid": self.grid.tolist(), "density": self.density.tolist(), "sigma": self.sigma},
            "trace": self.trace,
            "trace_error": self.trace_error,
            "density_products": self.products,
        }


@torch.no_grad()
def estimate_spectrum(operator: BatchedOperator, runs: int = 4, steps: int = 40, seed: int = 0) -> SpectrumEstimate:
    """The density by ``runs`` Lanczos runs of ``steps`` products, the trace by ``steps`` products more.

    Holds ``steps`` vectors of length P_local. All ranks must call it.
    """
    before, backend = operator.products, SpaceBackend(operator.space)
    steps = min(steps, operator.size)
    density = spectral_density(
        operator, num_runs=runs, lanczos_steps=steps, num_grid_points=GRID_POINTS, seed=seed, backend=backend
    )
    total = trace(operator, num_matvecs=steps, method="hutchinson", seed=seed + runs, backend=backend)
    return SpectrumEstimate(
        grid=density.grid.cpu(),
        density=density.density.cpu(),
        sigma=float(density.sigma),
        trace=total.estimate,
        trace_error=total.stderr,
        products=operator.products - before,
    )
