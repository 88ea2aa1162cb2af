"""Every method is the same run on one process, on two under DDP and on two under FSDP2, in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.distributed.cases_training import check_runs
from tests.ranks import run_ranks

BASE = [
    "train.precision=64", "curvature.precision=float64", "train.epochs=1", "train.max_steps_per_epoch=6",
    "train.max_eval_batches=1", "analysis.predict_forgetting=false", "analysis.spectral_density=false",
    "train.head_warmup_epochs=0", "curvature.num_samples=37", "experiment.export=false", "logger.tensorboard=false",
]  # fmt: skip
LORA = ["model.use_lora=true", "model.lora.r=2", "model.lora.dropout=0.1"]
METHODS = {
    # Where a gradient is rounding alone (a key's bias), so is its pull, and AdamW scales it up by 1 / eps = 1e8.
    "l2sp": ["method.strength=1", "train.optimizer=sgd"],
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
CASES |= {
    f"{name} lora": [*CASES[name], *LORA]
    for name in ("ewc", "lwf", "er", "derpp", "agem", "gpm", "nostalgia", "kronecker")
}
CASES["dropout"] = [
    "method=finetune", "model.config.hidden_dropout_prob=0.2", "train.gradient_accumulation_steps=2", *LORA,
]  # fmt: skip
CASES["ewc_lora lora"] = ["method=ewc_lora", "method.strength=100", "method.num_samples=37", *LORA]
CASES["kronecker kept lora"] = [*CASES["kronecker lora"], "model.lora.merge=never"]
CASES["diagonal"] = ["method=nostalgia", "method.top_k=3", "method.tail=diagonal", "method.project=soft"]
CASES["isotropic"] = ["method=nostalgia", "method.top_k=3", "method.tail=isotropic", "method.merge=ema"]
CASES["shared head"] = [
    "method=lwf", "experiment.tasks=null", "experiment.split=classes", "experiment.num_tasks=3", "experiment.head=shared",
]  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_one_process(name: str) -> None:
    one = {"one": [*CASES[name], *BASE, "dataset.batch_size=16"]}
    two = {layout: [*CASES[name], *BASE, "dataset.batch_size=8"] for layout in ("ddp", "fsdp")}
    with ThreadPoolExecutor() as pool:
        alone, pair = pool.map(lambda job: run_ranks(check_runs, job[0], runs=job[1])[0], ((1, one), (2, two)))
    expected = alone["one"]["steps"]
    assert len(expected) >= 12
    for layout in ("ddp", "fsdp"):
        assert len(pair[layout]["steps"]) == len(expected)
        for number, ((loss, norm, _), other) in enumerate(zip(expected, pair[layout]["steps"], strict=True)):
            assert other[0] == pytest.approx(loss, abs=1e-9), (layout, number)
            assert other[1] == pytest.approx(norm, rel=1e-6), (layout, number)
