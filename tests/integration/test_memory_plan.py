"""What a run says that it will remember at most, and what it then remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from nostalgia.config import parse
from nostalgia.experiment.components import build_components
from nostalgia.experiment.method_choice import complete_method
from nostalgia.experiment.scale import memory_plan
from tests.ranks import run_train

WORDS = [
    "--suite", "demo", "--quiet", "experiment.split=classes", "experiment.tasks=null", "experiment.num_tasks=4",
    "train.epochs=1", "train.max_steps_per_epoch=2", "train.head_warmup_epochs=0", "train.accelerator=cpu",
    "train.max_eval_batches=1", "logger.report=false", "experiment.export=false",
]  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "words",
    [
        ["method=kronecker"],
        ["method=kronecker", "model.use_lora=true", "model.lora.r=2"],
        ["method=kronecker", "method.budget_bytes=0"],
        ["method=nostalgia", "method.top_k=2", "model.use_lora=true", "model.lora.r=2"],
    ],
)
def test_the_tail_s_factors_are_counted(tmp_path: Path, words: list[str]) -> None:
    config = parse([*WORDS, *words]).config
    complete_method(config)
    run = build_components(config, Accelerator(cpu=True), "32")
    done = run_train([*WORDS, *words, "--run-dir", str(tmp_path / "run")])
    assert done.codes == [0], done.stderr
    kept = json.loads((tmp_path / "run" / "results" / "results.json").read_text())["memory_bytes"]
    plan = memory_plan(run, run.method)
    assert kept <= plan.bytes <= 1.02 * kept, (kept, plan)
    assert "Kronecker factors of " in plan.text


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("method", "bound"),
    [
        ("ewc", 1.0),
        ("si", 1.0),
        ("l2sp", 1.0),
        ("averaging", 1.0),
        ("ewc_lora", 1.0),
        ("nostalgia_ewc", 2.0),
        ("gpm", 20.0),
    ],
)
def test_what_a_method_keeps_is_within_its_plan(tmp_path: Path, method: str, bound: float) -> None:
    lora = ["model.use_lora=true", "model.lora.r=2"] if method == "ewc_lora" else []
    words = [*WORDS, f"method={method}", *lora]
    config = parse(words).config
    complete_method(config)
    run = build_components(config, Accelerator(cpu=True), "32")
    plan = memory_plan(run, run.method)
    done = run_train([*words, "--run-dir", str(tmp_path / "run")])
    assert done.codes == [0], done.stderr
    kept = json.loads((tmp_path / "run" / "results" / "results.json").read_text())["memory_bytes"]
    assert 0 < kept <= plan.bytes <= bound * kept, (kept, plan)
    assert plan.text
