"""Products and eigenpairs on 1, 2 and 3 ranks, with unequal shares and an empty rank: DDP and FSDP2."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_products_equal_the_dense_matrices(world_size: int) -> None:
    for errors in run_ranks("tests.distributed.cases_operators:check_products", world_size):
        for what, error in errors.items():
            assert error <= (1e-8 if "finite_difference" in what else 1e-10), what


@pytest.mark.parametrize("world_size", [2, 3])
def test_eigenpairs_equal_the_dense_ones(world_size: int) -> None:
    for found in run_ranks("tests.distributed.cases_operators:check_eigenpairs", world_size):
        for difference, residual in found.values():
            assert difference <= 1e-8
            assert residual <= 1e-8
