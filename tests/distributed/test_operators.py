"""Products and eigenpairs on 1, 2 and 3 ranks, with unequal shares and an empty rank: DDP and FSDP2."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_ranks


@pytest.fixture(scope="module", params=[1, 2, 3])
def outcome(request):
    """What each rank returned; the checks inside the ranks have passed."""
    return run_ranks("tests.distributed.cases_operators:check_all", request.param)


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
