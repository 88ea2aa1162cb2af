"""Products and eigenpairs on 1, 2 and 3 ranks, with unequal shares and an empty rank: DDP and FSDP2."""

from __future__ import annotations

import functools

import pytest

from nostalgia.curvature import HessianOperator
from nostalgia.curvature.forgetting import ForgettingPrediction
from nostalgia.curvature.rows import GradientRows, captured_energy, eigenpairs_of_rows
from nostalgia.curvature.shares import parameter_shares
from nostalgia.linalg.lanczos import lanczos
from tests.distributed import cases_operators
from tests.ranks import run_ranks
from tests.unit.curvature.networks import batches, forward_fn, loss_fn, mlp


@pytest.fixture(scope="module", params=[2, *(pytest.param(ranks, marks=pytest.mark.exhaustive) for ranks in (1, 3))])
def outcome(request):
    """What each rank returned; the checks inside the ranks have passed."""
    return run_ranks(cases_operators.check_all, request.param)


def test_products_equal_the_dense_matrices(outcome):
    for result in outcome:
        assert len(result["products"]) == 3 * (5 + 5 + 4)
        for what, error in result["products"].items():
            assert error <= (1e-8 if "finite_difference" in what else 1e-10), what


def test_eigenpairs_equal_the_dense_ones(outcome):
    for result in outcome:
        for difference, residual in result["eigenpairs"].values():
            assert difference <= 1e-8
            assert residual <= 1e-8
        assert result["eigenpairs"] == outcome[0]["eigenpairs"]


def test_rows_give_the_dense_eigenpairs_and_the_same_energy_on_any_number_of_ranks(outcome):
    data = batches("mlp", (11,))
    model = mlp()
    scope = dict(model.named_parameters())
    basis = eigenpairs_of_rows(GradientRows(model, forward_fn, data, scope, draws=3), 5).eigenvectors
    here = captured_energy(GradientRows(model, forward_fn, data, scope, draws=2, seed=5), basis)
    for result in outcome:
        assert len(result["rows"]) == 9
        for what, (error, residual, energy) in result["rows"].items():
            assert max(error, residual) <= 1e-10, what
            if what.startswith("mlp"):
                assert energy == pytest.approx(here, rel=1e-10), what


def test_float32_eigenvalues_are_those_of_the_dense_matrix(outcome):
    for result in outcome:
        assert len(result["float32"]) == 6
        for what, error in result["float32"].items():
            assert error <= 1e-5, what


def test_trace_and_density_are_those_of_the_dense_matrix(outcome):
    for result in outcome:
        for trace, density, grid, deviation, products in result["spectrum"].values():
            assert max(trace, density, grid) <= 1e-8
            assert deviation <= 5  # standard errors from the true trace
            assert products == 3 * 8
        assert result["spectrum"] == outcome[0]["spectrum"]


def test_predicted_forgetting_is_that_of_one_process(outcome):
    expected = run_here()
    for result in outcome:
        for wrap, numbers in result["forgetting"].items():
            assert numbers == pytest.approx(expected, rel=1e-7), wrap


@functools.cache
def run_here() -> dict[str, float]:
    """The same in this process, on vectors that are not spread at all."""
    operator = HessianOperator(mlp(), loss_fn, batches("mlp", (11,)))
    pairs = lanczos(operator, 4, tol=1e-9)
    prediction = ForgettingPrediction(operator.space, {"one": pairs.eigenvectors}, trace_samples=4)
    expansion = prediction.finish("one", operator, pairs)
    theta = operator.space.take(p.detach() for p in operator.parameters.values())
    (row,) = prediction.measure("two", theta + 0.1 * operator.space.randn(7), lambda _: 3.0)
    numbers = {name: value for name, value in vars(row).items() if isinstance(value, float)}
    first = parameter_shares(pairs.eigenvectors, pairs.eigenvalues, operator.space)[0]
    return {**numbers, "rest": expansion.rest, "gradient": expansion.gradient_norm, "first": first}
