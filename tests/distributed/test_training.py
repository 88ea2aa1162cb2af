"""A whole run on one process, on two under DDP and on two under FSDP2 is one and the same run, in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.distributed.cases_training import check_runs
from tests.ranks import run_ranks

pytestmark = pytest.mark.exhaustive  # losses and gradients of one process and two are in test_methods

FLOAT64 = ["train.precision=64", "nostalgia.precision=float64"]
VALIDATION = (72, 72)  # images a task


@pytest.fixture(scope="module")
def runs():
    """Every rank's account of each run, by name."""
    one = {"one": ["dataset.batch_size=32", *FLOAT64]}
    two = {name: ["dataset.batch_size=16", *FLOAT64] for name in ("ddp", "fsdp")}
    two["sharded bfloat16"] = [*two["ddp"], "nostalgia.basis_placement=sharded", "nostalgia.basis_dtype=bfloat16"]
    with ThreadPoolExecutor() as pool:
        groups = [pool.submit(run_ranks, check_runs, ranks, runs=words) for ranks, words in ((1, one), (2, two))]
        (alone,), pair = (group.result() for group in groups)
    return {"one": [alone["one"]], **{name: [rank[name] for rank in pair] for name in two}}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_step_is_that_of_one_process(runs, strategy):
    """Losses, gradient norms and projected fractions of warm-ups, task 1 and a projected task 2."""
    expected = runs["one"][0]["steps"]
    projected = [i for i, (_, _, fraction) in enumerate(expected) if fraction is not None]
    assert len(expected) >= 60
    assert len(projected) >= 18
    assert max(expected[i][2] for i in projected) > 0.01
    for rank in runs[strategy]:
        assert len(rank["steps"]) == len(expected)
        for number, (step, other) in enumerate(zip(expected, rank["steps"], strict=True)):
            loss, norm, fraction = step
            assert other[0] == pytest.approx(loss, abs=1e-10), number
            assert other[1] == pytest.approx(norm, rel=1e-8), number
            assert (other[2] is None) == (fraction is None), number
            assert fraction is None or other[2] == pytest.approx(fraction, abs=1e-7), number


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_curvature_and_accuracies_are_those_of_one_process(runs, strategy):
    alone, other = runs["one"][0], runs[strategy][0]
    for one, two in zip(alone["curvature"], other["curvature"], strict=True):
        assert two["eigenvalues"] == pytest.approx(one["eigenvalues"], rel=1e-5)
        assert two["products"] == one["products"]
        assert two["converged"] == one["converged"] == [True] * 4
    for mine, its in zip(alone["accuracies"], other["accuracies"], strict=True):
        for a, b, images in zip(mine, its, VALIDATION, strict=True):
            assert (a is None) == (b is None)
            assert a is None or abs(a - b) * images <= 2.01
    assert alone["accuracies"][0][0] > 0.9  # it learned something, so that the comparison says something


def test_nothing_leaks(runs):
    """Measured against the rows of Q as they are stored, bfloat16 ones too."""
    for ranks in runs.values():
        assert len(ranks[0]["leaks"]) == 2
        assert max(ranks[0]["leaks"]) <= 1e-12


def test_a_sharded_bfloat16_basis_serves_as_well(runs):
    """An eighth of the bytes of the replicated float64 one, the same accuracies within a few images."""
    (small,), (whole,) = runs["sharded bfloat16"][:1], runs["ddp"][:1]
    for mine, its in zip(small["curvature"], whole["curvature"], strict=True):
        basis, replicated = mine["memory_basis"], its["memory_basis"]
        assert (basis["placement"], basis["dtype"]) == ("sharded", "bfloat16")
        assert (replicated["placement"], replicated["dtype"]) == ("replicated", "float64")
        assert replicated["reason"].startswith("auto: ")
        assert basis["bytes_per_rank"] * 8 == replicated["bytes_per_rank"]
    assert small["steps"][:27] == whole["steps"][:27]  # nothing is projected in task 1
    assert small["steps"] != whole["steps"]
    for mine, its in zip(small["accuracies"], whole["accuracies"], strict=True):
        for a, b, images in zip(mine, its, VALIDATION, strict=True):
            assert a is None or abs(a - b) * images <= 4.01


def test_the_spectrum_is_that_of_one_process(runs):
    """hessian-eigenthings' density and trace on distributed operators, in the files and as a panel of the figure."""
    for name in ("ddp", "fsdp"):
        for mine, alone in zip(runs[name][0]["curvature"], runs["one"][0]["curvature"], strict=True):
            assert mine["trace"] == pytest.approx(alone["trace"], rel=1e-6)
            for part in ("grid", "density"):
                assert mine["density"][part] == pytest.approx(alone["density"][part], rel=1e-5, abs=1e-8)
            assert mine["density_products"] == 12
    assert [ranks[0]["spectrum_panels"] for ranks in runs.values()] == [2] * 4
