"""Projected steps on 1, 2 and 3 ranks equal the dense formulas: DDP with a replicated or sharded basis, and FSDP2."""

from __future__ import annotations

import pytest

from tests.distributed import cases_projection
from tests.ranks import run_ranks


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.exhaustive) for ranks in (1, 3))])
def test_projected_steps_equal_the_dense_formulas(ranks):
    results = run_ranks(cases_projection.check, ranks)
    sizes = list(zip(*(result["shards"] for result in results), strict=True))
    if ranks > 1:
        assert any(0 in size for size in sizes)  # empty shards
        assert any(len(set(size) - {0}) > 1 for size in sizes)  # uneven ones
    for result in results:
        assert len(result["errors"]) == 2 * 3 * 2 * 3
        for run, errors in result["errors"].items():
            for what, error in errors.items():
                assert error <= 1e-10, (run, what)
