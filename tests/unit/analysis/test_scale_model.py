"""The scale model's arithmetic, and its constants against what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nostalgia.analysis.scale_model import Cluster, Load, stages, table

RESULTS = Path(__file__).parents[3] / "bench" / "results"
MEASURED = RESULTS / "step_vit_b_whole_gpu.json"
P = 85_798_656
VIT_B = Load(
    parameters=P, trained=P, scope=P, largest_unit=7_087_872, forward_flops=35.126e9, activation_numbers=29_000_000,
    mixed_precision=True, optimizer_states=2, batch=32, images=(16_000, 16_000), tasks=2, curved=1,
)  # fmt: skip
# Of 12 layers: four weights of 768 x 768, two of 768 x 3,072.
PENALTY = 12 * (4 * 2 * 768**2 * (2 * 768) + 2 * 2 * 768 * 3072 * (768 + 3072))


def step(load: Load, **machine: Any) -> Any:
    return stages(load, Cluster(**machine))[0]


@pytest.mark.parametrize(
    ("method", "load"),
    [
        ("finetune", VIT_B),
        ("nostalgia32", replace(VIT_B, columns=2 * 32)),  # half of what there is in the end is there on average
        ("nostalgia128", replace(VIT_B, columns=2 * 128)),
        ("kronecker", replace(VIT_B, factor_numbers=1, factor_terms=1, penalty_flops=PENALTY)),
    ],
)
def test_a_step_is_what_was_measured(method: str, load: Load) -> None:
    rows = json.loads(MEASURED.read_text())["rows"]
    (measured,) = [row["step_ms"] for row in rows if row["method"] == method]
    assert 1000 * step(load).seconds == pytest.approx(measured, rel=0.2)


def test_shards_are_a_share_and_directions_are_spread() -> None:
    alone, ddp = step(VIT_B), step(VIT_B, gpus=8)
    sharded = step(VIT_B, gpus=8, sharded=True)
    activations = 32 * 2 * 29_000_000
    assert alone.memory_bytes == ddp.memory_bytes == 4 * 5 * P + activations
    assert sharded.memory_bytes == 4 * (4 * P // 8 + 2 * VIT_B.largest_unit) + activations
    with_memory = step(replace(VIT_B, columns=64), gpus=8)
    assert with_memory.memory_bytes - ddp.memory_bytes == 4 * 64 * P // 8


def test_bytes_are_those_of_rings() -> None:
    assert step(VIT_B).bytes_sent == 0
    assert step(VIT_B, gpus=4).bytes_sent == 2 * 4 * P * 3 // 4  # an all-reduce
    assert step(VIT_B, gpus=4, sharded=True).bytes_sent == 3 * 4 * P * 3 // 4  # two gathers and a scatter
    product = stages(replace(VIT_B, top_k=8, samples=64), Cluster(gpus=4))[1]
    assert product.name == "curvature product"
    assert product.count == 3 * 8 + 10
    assert product.bytes_sent == 2 * 4 * P * 3 // 4


def test_rows_take_the_place_of_products() -> None:
    load = replace(VIT_B, top_k=8, samples=64, scope=600_000, rows_per_sample=2)
    rows = stages(load, Cluster(gpus=4))[1]
    assert (rows.name, rows.count) == ("gradients by rows", 1)
    assert rows.bytes_sent == 4 * (64 * 2 * 600_000 // 4) * 3 // 4  # what each rank's samples leave to the others
    assert rows.memory_bytes - stages(load, Cluster(gpus=8))[1].memory_bytes == 4 * 64 * 2 * 600_000 // 8
    # A forward and two backward passes of activations alone, where Lanczos takes 34 products of six forward passes.
    lanczos = stages(replace(load, rows_per_sample=0), Cluster(gpus=4))[1]
    assert lanczos.count * lanczos.compute_seconds == pytest.approx(34 * 6 / 3 * rows.compute_seconds)


def test_the_slowest_link_decides() -> None:
    within, between = (step(VIT_B, gpus=16, nodes=nodes) for nodes in (1, 2))
    assert between.communication_seconds == pytest.approx(within.communication_seconds * 300 / 25)
    assert between.seconds == max(between.compute_seconds, between.communication_seconds)


def test_frozen_weights_cost_a_third_less() -> None:
    lora = replace(VIT_B, trained=0)
    assert step(lora).compute_seconds == pytest.approx(step(VIT_B).compute_seconds * 2 / 3)


def test_it_says_what_does_not_fit() -> None:
    for memory, words in ((80.0, "fits, "), (2.0, "does not fit, ")):
        console = Console(width=100, record=True)
        cluster = Cluster(memory=memory)
        console.print(table(VIT_B, cluster, stages(VIT_B, cluster)))
        assert words in console.export_text()


def test_steps_are_those_of_the_loop() -> None:
    """Each epoch ends with what is left of its images, and at the most steps that a run takes of it."""
    load = replace(VIT_B, images=(100, 100, 33), batch=8)
    assert load.passes(1) == 13 + 13 + 5
    assert load.passes(4) == 4 + 4 + 2
    assert replace(load, max_steps=2, accumulation=3).passes(1) == 6 + 6 + 5


@pytest.mark.parametrize("row", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_product_s_computing_is_shared_among_ranks(row: int, ranks: int) -> None:
    """Processor time of gloo ranks on two cores, predicted from one process's to a fifth; graphs built anew, and kept."""
    files = {
        found["world_size"]: found for found in json.loads((RESULTS / "ranks_1_2_4_8.json").read_text())["products"]
    }
    numbers = files[1]["parameters"]
    load = replace(VIT_B, scope=numbers, forward_flops=1e9, top_k=1, samples=256)
    alone, several = (files[n]["rows"][row] for n in (1, ranks))
    teraflops = stages(load, Cluster(teraflops=1.0))[1].compute_seconds / alone["seconds"]
    product = stages(load, Cluster(gpus=ranks, teraflops=teraflops))[1]
    assert product.seconds == pytest.approx(several["seconds"], rel=0.2)
    assert several["collectives"] == [2, 0]
    assert several["bytes"] == 2 * 4 * ranks * math.ceil(numbers / ranks)  # shards of equal size
