"""Every method's run that is killed ends, to the bit, as if it had not been: its state is whole in every checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.soak import Soak

SHORT = [
    "experiment.tasks=[{dataset: digits, classes: [0, 1]}, {dataset: digits, classes: [2, 3]}]",
    "train.head_warmup_epochs=0", "train.epochs=1", "train.max_eval_batches=1", "experiment.export=false",
    "logger.report=false",
]  # fmt: skip
LORA = ["model.use_lora=true", "model.lora.r=2"]
METHODS = {
    "l2sp": ["method.strength=1"],
    "ewc": ["method.strength=100", "method.num_samples=32"],
    "si": ["method.strength=10"],
    "lwf": ["method.strength=1"],
    "lwf remembered": ["method.strength=1", "dataset.augment=none", "train.epochs_per_task=[1,2]"],
    "er": ["method.budget_bytes=6000"],
    "derpp": ["method.budget_bytes=6000"],
    "agem": ["method.budget_bytes=6000", "method.reference_size=8"],
    "gpm": ["method.num_samples=32", "method.threshold=0.9"],
    "nostalgia_ewc": ["method.strength=10"],
    "nostalgia": ["method.tail=kronecker", "method.anchor=0.5", "method.tail_samples=32", *LORA],
    "nostalgia lion": ["train.optimizer=lion", "method.metric_every=3"],
    "finetune adafactor": ["train.optimizer=adafactor"],
    "kronecker": ["method.num_samples=32", "train.head_lr=2e-2", *LORA],
    "ewc_lora": ["method.strength=100", "method.num_samples=32", *LORA],
    "averaging": ["method.mode=uniform"],
    "heads_only": [],
    "joint": [],
    "tests.faults.own_method:Counting": [],
}
SHARDED = ("kronecker", "examples.own_method:Pulling")


TYPICAL = ("kronecker",)  # the others by -m exhaustive
EVERY = [pytest.param(name, marks=() if name in TYPICAL else pytest.mark.exhaustive) for name in METHODS]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", EVERY)
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, name: str) -> None:
    method = f"method.name={name}" if ":" in name else f"method={name.split()[0]}"
    soak = Soak(tmp_path, "single", seed=1, words=[method, *METHODS[name], *SHORT])
    soak.most_events = 120
    soak.kills(2)
    assert not soak.problems


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SHARDED)
def test_state_of_shards_goes_on_within_a_task(tmp_path: Path, name: str) -> None:
    words = [f"method.name={name}", *METHODS.get(name, []), *SHORT, "train.checkpoint_every_steps=1"]
    soak = Soak(tmp_path, "fsdp2", seed=1, words=words)
    soak.most_events = 120
    soak.kills(2)
    assert not soak.problems
