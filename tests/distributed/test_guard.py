"""Ranks that no longer hold the same parameters are found within `guard_every_n_steps`, and end together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nostalgia.linalg.block import Block
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods import Method
from tests.distributed import diverging_run
from tests.ranks import run, run_train


class Apart(Method):
    """Leaves every rank with weights of its own when a task ends."""

    name = "apart"

    def end_task(self, task):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            for parameter in task.parameters.values():
                parameter += 0.01 * task.accelerator.process_index


class Unreduced(Method):
    """Keeps what it has summed over its own rank's samples alone."""

    name = "unreduced"

    def __init__(self, config, seed):  # type: ignore[no-untyped-def]
        super().__init__(config, seed=seed)
        self.sum = torch.zeros(2)

    def end_task(self, task):  # type: ignore[no-untyped-def]
        self.sum = torch.full((2,), 1.0 + task.accelerator.process_index)

    def state_dict(self):  # type: ignore[no-untyped-def]
        return {"kept": {"sum": self.sum, "tasks": 1}}

    def load_state_dict(self, state):  # type: ignore[no-untyped-def]
        self.sum = state["kept"]["sum"]


class OwnVectors(Unreduced):
    """Has the same in a block of vectors that every rank keeps whole."""

    name = "own_vectors"

    def state_dict(self):  # type: ignore[no-untyped-def]
        parameters = self.task.parameters
        space = VectorSpace.of(parameters, placement="local")
        return {"center": Block(space.take(p.detach() for p in parameters.values())[None] * self.sum[0], space)}

    def load_state_dict(self, state):  # type: ignore[no-untyped-def]
        self.sum = state["center"].rows[0, :2]


PARAMETER = "model.layers.1.mlp.fc1.weight"
WORDS = (
    "--suite", "demo", "--quiet", "train.epochs=1", "train.head_warmup_epochs=0", "nostalgia.guard_every_n_steps=5",
    "experiment.tasks=[{dataset: digits, classes: [0, 1]}]",
)  # fmt: skip


def test_a_parameter_that_differs_on_one_rank_ends_the_run(tmp_path: Path) -> None:
    words = [*WORDS, f"experiment.output_dir={tmp_path / 'runs'}"]
    done = run(diverging_run.main, PARAMETER, words, world_size=2)
    assert done.codes == [4, 4]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"epoch 1, step 5: ranks have diverged: {PARAMETER} differs on rank 1 from rank 0" in error
    assert "Traceback" not in done.stderr


def test_a_method_that_leaves_ranks_apart_ends_the_run_however_short_the_task(tmp_path: Path) -> None:
    words = [word for word in WORDS if "guard_every" not in word]  # every 100 steps, which this run does not have
    words += [f"method={__name__}:Apart", f"experiment.output_dir={tmp_path / 'runs'}", "train.max_steps_per_epoch=2"]
    done = run_train(words, world_size=2)
    assert done.codes == [4, 4]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "task1_digits, at its end: ranks have diverged: " in error


@pytest.mark.parametrize(("name", "where"), [("Unreduced", "method/kept/sum"), ("OwnVectors", "method/center")])
def test_a_method_whose_state_is_not_that_of_all_ranks_ends_the_run(tmp_path: Path, name: str, where: str) -> None:
    words = [
        *WORDS,
        f"method={__name__}:{name}",
        f"experiment.output_dir={tmp_path / 'runs'}",
        "train.max_steps_per_epoch=2",
    ]
    done = run_train(words, world_size=2)
    assert done.codes == [4, 4]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"its state {where} on rank 1 is not rank 0's" in error


def test_nostalgia_keeps_the_same_on_all_ranks(tmp_path: Path) -> None:
    """With its factors and its eigensolve's report in the checkpoints; other methods are in tests/faults."""
    words = [
        *WORDS[:-1],
        "method=nostalgia",
        f"experiment.output_dir={tmp_path / 'runs'}",
        "train.max_steps_per_epoch=2",
    ]
    words += ["experiment.tasks=[{dataset: digits, classes: [0, 1]}, {dataset: digits, classes: [2, 3]}]"]
    done = run_train(words, world_size=2)
    assert done.codes == [0, 0], done.stderr
