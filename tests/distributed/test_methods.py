"""Every method is the same run on one process, on two under DDP and on two under FSDP2, in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.distributed.cases_training import check_runs
from tests.ranks import run_ranks

BASE = [
    "train.precision=64", "curvature.precision=float64", "train.epochs=1", "train.max_steps_per_epoch=6",
    "train.max_eval_batches=1", "analysis.predict_forgetting=false", "analysis.spectral_density=false",
    "train.head_warmup_epochs=0", "curvature.num_samples=37",
]  # fmt: skip
LORA = ["model.use_lora=true", "model.lora.r=2", "model.lora.dropout=0"]
METHODS = {
    "l2sp": ["method.strength=1"],
    "ewc": ["method.strength=100", "method.num_samples=37"],
    "si": ["method.strength=10"],
    "lwf": ["method.strength=1"],
    "er": ["method.budget_bytes=6000"],
    "derpp": ["method.budget_bytes=6000"],
    "agem": ["method.budget_bytes=6000", "method.reference_size=9"],
    "gpm": ["method.num_samples=37", "method.threshold=0.9"],
    "nostalgia_ewc": ["method.strength=10", "method.top_k=3"],
    "nostalgia": ["method.top_k=3", "method.tail=kronecker", "method.anchor=0.5", "method.tail_samples=37"],
    "kronecker": ["method.strength=10", "method.num_samples=37"],
    "averaging": ["method.mode=greedy"],
    "heads_only": [],
}
CASES = {name: [f"method={name}", *words] for name, words in METHODS.items()}
CASES |= {f"{name} lora": [*CASES[name], *LORA] for name in ("ewc", "lwf", "er", "gpm", "nostalgia", "kronecker")}
CASES["ewc_lora lora"] = ["method=ewc_lora", "method.strength=100", "method.num_samples=37", *LORA]
CASES["kronecker restarted lora"] = [*CASES["kronecker lora"], "model.lora.merge=task"]
CASES["diagonal"] = ["method=nostalgia", "method.top_k=3", "method.tail=diagonal", "method.project=soft"]
CASES["isotropic"] = ["method=nostalgia", "method.top_k=3", "method.tail=isotropic", "method.merge=ema"]
CASES["shared head"] = [
    "method=lwf", "experiment.tasks=null", "experiment.split=classes", "experiment.num_tasks=3", "experiment.head=shared",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    """Rank 0's account of each run, by case and layout."""
    one = {f"one {name}": [*words, *BASE, "dataset.batch_size=16"] for name, words in CASES.items()}
    two = {
        f"{layout} {name}": [*words, *BASE, "dataset.batch_size=8"]
        for name, words in CASES.items()
        for layout in ("ddp", "fsdp")
    }
    with ThreadPoolExecutor() as pool:
        alone, pair = pool.map(lambda job: run_ranks(check_runs, job[0], runs=job[1])[0], ((1, one), (2, two)))
    return {
        name: {"one": alone[f"one {name}"], "ddp": pair[f"ddp {name}"], "fsdp": pair[f"fsdp {name}"]} for name in CASES
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(runs: dict[str, dict[str, Any]], name: str, layout: str) -> None:
    expected, found = runs[name]["one"]["steps"], runs[name][layout]["steps"]
    assert len(found) == len(expected) >= 12
    for number, ((loss, norm, _), other) in enumerate(zip(expected, found, strict=True)):
        assert other[0] == pytest.approx(loss, abs=1e-9), number
        assert other[1] == pytest.approx(norm, rel=1e-6), number
