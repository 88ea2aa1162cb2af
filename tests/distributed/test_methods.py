"""Every method is the same run on one process, on two under DDP and on two under FSDP2, in float64."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    "derpp": ["method.budget_bytes=6000", "train.optimizer=sgd"],  # for the same reason
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
    "method=finetune", "model.config.hidden_dropout_prob=0.2", "train.gradient_accumulation_steps=2",
    "train.head_lr=2e-2", *LORA,
]  # fmt: skip
CASES["ewc_lora lora"] = ["method=ewc_lora", "method.strength=100", "method.num_samples=37", *LORA]
CASES["kronecker frozen lora"] = [
    *CASES["kronecker lora"],
    "model.lora.freeze_a=true",
    "analysis.predict_forgetting=auto",
]
CASES["kronecker kept lora"] = [*CASES["kronecker lora"], "model.lora.merge=never"]
CASES["path lora"] = [*CASES["kronecker lora"], "method.path=auto"]
CASES["diagonal path"] = [
    "method=nostalgia", "method.top_k=3", "method.tail=diagonal", "method.project=soft", "method.path=0.5",
]  # fmt: skip
CASES["diagonal"] = ["method=nostalgia", "method.top_k=3", "method.tail=diagonal", "method.project=soft"]
CASES["isotropic"] = ["method=nostalgia", "method.top_k=3", "method.tail=isotropic", "method.merge=ema"]
CASES["shared head"] = [
    "method=lwf", "experiment.tasks=null", "experiment.split=classes", "experiment.num_tasks=3", "experiment.head=shared",
]  # fmt: skip
# Images that are not augmented and seen more than once: the teacher's logits are gathered over ranks.
CASES["remembered logits"] = [
    "method=lwf", "method.strength=1", "dataset.augment=none", "train.epochs_per_task=[1,4]",
    "experiment.tasks=[{dataset: digits, classes: [0, 1]}, {dataset: digits, classes: [2, 3]}]",
]  # fmt: skip


# Of each kind one; the others by -m exhaustive.
TYPICAL = ("nostalgia lora", "kronecker lora", "derpp lora", "dropout")
EVERY = [pytest.param(name, marks=() if name in TYPICAL else pytest.mark.exhaustive) for name in CASES]


def check_layouts(name: str, ranks: int, batch: int, within: float) -> None:
    """The losses and gradient norms of ``ranks``, under DDP and FSDP2, are those of one process on the same batches."""
    one = {"one": [*CASES[name], *BASE, f"dataset.batch_size={batch}"]}
    several = {layout: [*CASES[name], *BASE, f"dataset.batch_size={batch // ranks}"] for layout in ("ddp", "fsdp")}
    with ThreadPoolExecutor() as pool:
        alone, found = pool.map(lambda job: run_ranks(check_runs, job[0], runs=job[1])[0], ((1, one), (ranks, several)))
    expected = alone["one"]["steps"]
    assert len(expected) >= 12
    for layout in ("ddp", "fsdp"):
        assert len(found[layout]["steps"]) == len(expected)
        for number, ((loss, norm, _), other) in enumerate(zip(expected, found[layout]["steps"], strict=True)):
            assert other[0] == pytest.approx(loss, abs=within), (layout, number)
            assert other[1] == pytest.approx(norm, rel=1e-6), (layout, number)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", EVERY)
def test_losses_and_gradients_are_those_of_one_process(name: str) -> None:
    check_layouts(name, ranks=2, batch=16, within=1e-10)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_losses_of_three_ranks_are_those_of_one_process(name: str) -> None:
    check_layouts(name, ranks=3, batch=12, within=1e-10)


@pytest.mark.exhaustive
def test_forgetting_of_merged_adapters_is_predicted_in_their_layers_weights() -> None:
    """Small steps go as the gradient in the weights foretells, though the adapters have begun anew in between."""
    words = [
        "method=finetune", *LORA, *BASE, "model.lora.merge=task", "analysis.predict_forgetting=true", "train.lr=3e-5",
        "train.warmup_epochs=0", "train.label_smoothing=0", "analysis.exact_second_order=true", "curvature.kind=hessian",
    ]  # fmt: skip
    alone = run_ranks(check_runs, 1, runs={"one": [*words, "dataset.batch_size=16"]})[0]["one"]["forgetting"]
    two = {layout: [*words, "dataset.batch_size=8"] for layout in ("ddp", "fsdp")}
    pair = run_ranks(check_runs, 2, runs=two)[0]
    assert len(alone) == 1
    assert alone[0]["measured"] != 0
    assert alone[0]["predicted"] == pytest.approx(alone[0]["measured"], rel=0.05)
    assert 0 < alone[0]["kronecker"] < 0.05 * abs(alone[0]["linear"])
    assert alone[0]["linear"] + alone[0]["exact"] == pytest.approx(alone[0]["measured"], rel=0.005)
    for layout in ("ddp", "fsdp"):
        (other,) = pair[layout]["forgetting"]
        for term in ("measured", "linear", "kronecker", "exact", "displacement"):
            assert other[term] == pytest.approx(alone[0][term], rel=1e-5), (layout, term)


def test_softened_factors_are_not_taken_for_the_curvature_of_the_loss() -> None:
    """At no strength to speak of, runs of two temperatures are one, and so is what is predicted of them."""
    words = [
        "method=kronecker", "method.strength=1e-12", "method.num_samples=37", *LORA, *BASE, "model.lora.merge=never",
        "analysis.predict_forgetting=auto", "analysis.exact_second_order=true", "dataset.batch_size=16",
        "curvature.kind=hessian", "train.lr=3e-5", "train.warmup_epochs=0", "train.label_smoothing=0",
    ]  # fmt: skip
    runs = {f"T={t}": [*words, f"method.temperature={t}"] for t in (1, 4)}
    found = run_ranks(check_runs, 1, runs=runs)[0]
    (own,), (softened,) = (found[name]["forgetting"] for name in runs)
    assert own["kronecker"] > 0
    assert softened["kronecker"] == pytest.approx(own["kronecker"], rel=1e-5)
    assert own["linear"] + own["exact"] == pytest.approx(own["measured"], rel=0.005)


@pytest.mark.exhaustive
def test_bench_eigenspaces_measures_each_way_on_images_put_aside(tmp_path: Path) -> None:
    words = [
        "method=bench.eigenspaces:Eigenspaces", f"method.out={tmp_path / 'eigenspaces.json'}", "method.k=2",
        "method.held_out=16", *BASE, "curvature.num_samples=80", "curvature.batch_size=16", "curvature.tol=0.3",
    ]  # fmt: skip
    run_ranks(check_runs, 1, runs={"one": words})
    found = json.loads((tmp_path / "eigenspaces.json").read_text())["rows"]
    assert [row["by"] for row in found] == ["Kronecker factors", "rows", "lanczos, ggn", "lanczos, hessian"]
    assert {row["samples"] for row in found} == {64}
    assert all(row["epochs"] > 0 for row in found)
    rows, ggn, hessian = found[1:]
    assert rows["products"] == 0 < min(ggn["products"], hessian["products"])
    assert 0.1 < rows["captured_energy"] < 1
    assert rows["captured_energy"] == pytest.approx(ggn["captured_energy"], rel=0.2)


def test_the_terms_of_bench_orders_are_those_of_the_loss(tmp_path: Path) -> None:
    """On the first tenth of a short way second order is the loss; what is left of it by layer is less than the whole."""
    words = [
        "method=bench.orders:Orders", f"method.out={tmp_path / 'orders.json'}", "method.strength=0", "train.precision=64",
        *BASE, "train.lr=3e-3", "train.label_smoothing=0", "dataset.batch_size=16",
    ]  # fmt: skip
    run_ranks(check_runs, 1, runs={"one": words})
    (row,) = json.loads((tmp_path / "orders.json").read_text())
    second = 0.1 * row["linear"] + 0.01 * row["hessian"]
    assert row["measured"][0] == pytest.approx(second, rel=0.01)
    assert row["measured"][0] != pytest.approx(0.1 * row["linear"], rel=0.01)
    assert 0 < row["blocks"] < row["ggn"]
    assert row["kronecker"] > 0


def test_forgetting_is_measured_with_the_head_as_the_task_ended() -> None:
    """A head that goes on and grows would change an old task's loss by itself: with steps of no length nothing does."""
    words = [
        "method=kronecker", "method.num_samples=37", *BASE, "experiment.tasks=null", "experiment.split=classes",
        "experiment.num_tasks=3", "experiment.head=shared", "analysis.predict_forgetting=auto", "train.lr=1e-12",
        "dataset.batch_size=16",
    ]  # fmt: skip
    rows = run_ranks(check_runs, 1, runs={"one": words})[0]["one"]["forgetting"]
    assert len(rows) == 3
    assert max(abs(row["measured"]) for row in rows) < 1e-8
