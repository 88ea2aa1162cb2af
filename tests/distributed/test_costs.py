"""What a solve and its memory cost a rank, measured: bytes that fall as 1 / W, and the collectives a product needs."""

from __future__ import annotations

import pytest

from nostalgia.analysis.scale_model import Cluster, Load, stages
from tests.distributed import cases_costs
from tests.ranks import run_ranks


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(ranks, marks=pytest.mark.exhaustive) for ranks in (2, 4)),
        pytest.param(8, marks=pytest.mark.long),
    ],
)
def costs(request):
    """By number of ranks, then rank, then wrapping: of one process and of several."""
    (alone,) = cases_costs.check(["bare"]).values()
    return {
        1: [{"ddp": alone, "fsdp2": alone}],
        request.param: run_ranks(cases_costs.check, request.param, wraps=["ddp", "fsdp2"]),
    }


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_bytes_of_vectors_fall_with_the_number_of_ranks(costs, wrap):
    (alone,) = [result[wrap] for result in costs[1]]
    whole, _ = alone["sizes"]
    for ranks, results in costs.items():
        for result in (result[wrap] for result in results):
            assert result["sizes"] == [whole, whole // ranks]
            assert result["q"] * ranks == alone["q"] == cases_costs.RANK * whole * 8
            assert result["anchor"] * ranks == alone["anchor"] == whole * 8
            # All that a solve holds: 2 k + 18 rows, and small matrices that are the same on all ranks.
            rows = (2 * cases_costs.RANK + 18) * whole * 8 // ranks
            assert rows <= result["solve"] <= rows + 30_000
            assert result["gathered"] == whole * 8  # beside them: the parameters, whole for the products


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_large_collectives_a_product_and_three_small_ones_at_most(costs, wrap):
    for result in (result[wrap] for result in costs[max(costs)]):
        products = result["products"]
        assert result["large"] == [["_allgather_base_", products], ["_reduce_scatter_base_", products]]
        assert 1 <= result["small_an_iteration"] <= 3
        claimed, seen = result["collectives"]
        assert claimed == seen


def test_the_scale_model_counts_the_same(costs):
    """The vectors of a solve and what a product sends; in float64 here, float32 there."""
    (alone,) = costs[1]
    whole, _ = alone["fsdp2"]["sizes"]
    load = Load(
        parameters=1, trained=0, scope=whole, largest_unit=0, forward_flops=0.0, activation_numbers=0, mixed_precision=False,
        optimizer_states=0, batch=1, images=(1,), tasks=1, top_k=cases_costs.RANK, samples=30, curved=1,
    )  # fmt: skip
    ranks = max(costs)
    product = stages(load, Cluster(gpus=ranks, sharded=True))[1]
    vectors = 2 * (product.memory_bytes - 4 * 2 * whole)
    for result in costs[ranks]:
        assert vectors == pytest.approx(result["fsdp2"]["solve"], abs=30_000)
    assert product.bytes_sent == 2 * 4 * whole * (ranks - 1) // ranks
