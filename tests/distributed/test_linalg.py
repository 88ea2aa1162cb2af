"""Linear algebra on 1, 2 and 3 ranks: DDP's slices and FSDP2's shards give one process's numbers."""

from __future__ import annotations

import pytest

from tests.distributed import cases_linalg
from tests.ranks import run_ranks

pytestmark = pytest.mark.exhaustive  # products and eigenpairs on two ranks are in test_operators


@pytest.fixture(scope="module")
def outcome():
    """What each rank returned, by number of ranks; the checks inside the ranks have passed."""
    return {ranks: run_ranks(cases_linalg.check_all, world_size=ranks) for ranks in (1, 2, 3)}


def test_every_rank_holds_its_part(outcome):
    for ranks, results in outcome.items():
        sliced, sharded = zip(*(result["sizes"] for result in results), strict=True)
        assert sum(sliced) == sum(sharded) == 60
        assert max(sliced) == -(-60 // ranks)
    assert len({result["sizes"][1] for result in outcome[3]}) == 3  # uneven shards


def test_ranks_and_rank_counts_agree(outcome):
    reference = outcome[1][0]
    for ranks, results in outcome.items():
        for result in results:
            for name, eigenvalues in reference["eigenvalues"].items():
                assert result["eigenvalues"][name] == pytest.approx(eigenvalues, rel=1e-10, abs=1e-11), (
                    ranks,
                    name,
                )
            for placement, numbers in reference["backend"].items():
                assert result["backend"][placement] == pytest.approx(numbers, rel=1e-6, abs=1e-8), (
                    ranks,
                    placement,
                )
            assert result["eigenvalues"] == results[0]["eigenvalues"]  # to the bit within a run
            assert result["backend"] == results[0]["backend"]


def test_memory_falls_with_the_number_of_ranks(outcome):
    for ranks, results in outcome.items():
        for result in results:
            assert result["bytes"] == [whole // ranks for whole in outcome[1][0]["bytes"]]
