"""hessian-eigenthings' algorithms on a vector space, against the dense matrix."""

from __future__ import annotations

import torch
from hessian_eigenthings.algorithms.spectral_density import spectral_density
from hessian_eigenthings.algorithms.trace import trace

from nostalgia.linalg.backend import SpaceBackend
from nostalgia.linalg.vector_space import VectorSpace
from tests.unit.linalg.operators import DenseOperator, shapes_of, spectrum_matrix


def make():
    values = torch.linspace(-1, 3, 60, dtype=torch.float64)
    matrix = spectrum_matrix(values)
    operator = DenseOperator(matrix, VectorSpace.of(shapes_of(60), dtype=torch.float64))
    return values, matrix, operator


def test_hutchinson_trace():
    _, matrix, operator = make()
    backend = SpaceBackend(operator.space)
    result = trace(operator, num_matvecs=200, method="hutchinson", seed=0, backend=backend)
    assert abs(result.estimate - float(matrix.trace())) < 4 * result.stderr
    assert 0 < result.stderr < 2.0
    assert len(set(result.samples.tolist())) == 200  # every draw is another vector
    gaussian = trace(operator, num_matvecs=50, method="hutchinson", distribution="gaussian", seed=0, backend=backend)
    assert abs(gaussian.estimate - float(matrix.trace())) < 4 * gaussian.stderr


def test_spectral_density():
    values, _, operator = make()
    result = spectral_density(
        operator,
        num_runs=4,
        lanczos_steps=40,
        seed=0,
        backend=SpaceBackend(operator.space),
        num_grid_points=400,
    )
    mass = torch.trapezoid(result.density, result.grid)
    mean = torch.trapezoid(result.density * result.grid, result.grid)
    assert abs(float(mass) - 1) < 1e-3
    assert abs(float(mean) - float(values.mean())) < 0.2
    assert float(result.grid.min()) < -1 < 3 < float(result.grid.max())


def test_draws_without_a_generator_differ_and_repeat():
    _, _, operator = make()
    first, second = SpaceBackend(operator.space), SpaceBackend(operator.space)
    probe = operator.space.zeros()
    draws = [first.randn_like(probe), first.rademacher_like(probe)]
    assert torch.equal(draws[0], second.randn_like(probe))
    assert torch.equal(draws[1], second.rademacher_like(probe))
    assert not torch.equal(first.randn_like(probe), draws[0])
    assert torch.equal(first.zeros_like(draws[0]), probe)
    torch.testing.assert_close(first.scale(2.0, draws[0]), 2 * draws[0])
    torch.testing.assert_close(first.axpy(2.0, draws[0], draws[1]), 2 * draws[0] + draws[1])
