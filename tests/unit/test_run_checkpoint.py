"""What a checkpoint takes of a run that is stopped where its parts are not as they will go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from nostalgia.config import parse
from nostalgia.errors import NotFoundError
from nostalgia.experiment.components import build_components
from nostalgia.experiment.resume import ResumedRun
from nostalgia.experiment.run_checkpoint import RunCheckpoint
from nostalgia.experiment.state import RunState
from nostalgia.methods import Method
from nostalgia.models import norm_statistics

RESNET = ["dataset=digits", "model=resnet18", "dataset.image_size=32", "model.pretrained=false"]


def test_stopped_while_an_earlier_task_is_evaluated_the_last_tasks_statistics_are_kept() -> None:
    run = build_components(parse(RESNET).config, Accelerator(cpu=True), "32")
    first = norm_statistics.capture(run.backbone)
    second = {name: value + 1 for name, value in first.items()}
    norm_statistics.apply(run.backbone, second)
    run.norm_statistics += [first, second]
    analysis = SimpleNamespace(state=dict)
    checkpoint = RunCheckpoint(run, analysis, run.backbone.state_dict(), Path())  # type: ignore[arg-type]
    with norm_statistics.using(run.backbone, first):
        contents = checkpoint.take("stopped", RunState(round=2, stage="evaluate"), None, {})
    for name, value in second.items():
        assert torch.equal(contents.tensors[f"ranks/0/norm/{name}"], value), name


def test_stopped_while_a_task_ends_what_its_method_made_of_the_statistics_is_kept() -> None:
    run = build_components(parse(RESNET).config, Accelerator(cpu=True), "32")
    run.norm_statistics += [norm_statistics.capture(run.backbone)]
    anew = {name: value + 1 for name, value in run.norm_statistics[0].items()}
    norm_statistics.apply(run.backbone, anew)
    checkpoint = RunCheckpoint(run, SimpleNamespace(state=dict), run.backbone.state_dict(), Path())  # type: ignore[arg-type]
    contents = checkpoint.take("eigensolve", RunState(round=1, stage="end"), None, {})
    for name, value in anew.items():
        assert torch.equal(contents.tensors[f"ranks/0/norm/{name}"], value), name


def test_the_gradient_scaler_goes_on_at_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between phases too: it would begin at its first scale, and leave out other steps."""
    accelerator = Accelerator(cpu=True)
    run = build_components(parse(RESNET).config, accelerator, "32")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    checkpoint = RunCheckpoint(run, SimpleNamespace(state=dict), run.backbone.state_dict(), Path())  # type: ignore[arg-type]
    contents = checkpoint.take("end_of_task", RunState(round=2), None, {})
    assert contents.state["scaler"]["scale"] == 256.0


def test_a_task_whose_head_is_other_tasks_too_has_no_statistics_of_its_own() -> None:
    """They would say which of the tasks an image is of, which accuracy under one head does not know."""
    for shared, expected in ((False, 2), (True, 0)):
        words = [*RESNET, "experiment.split=classes", f"experiment.head={'shared' if shared else 'per_task'}"]
        run = build_components(parse(words).config, Accelerator(cpu=True), "32")
        own = norm_statistics.capture(run.backbone)
        run.norm_statistics = [own]
        assert run.statistics_of(run.tasks[0]) is own  # alone so far
        run.norm_statistics = [own, {name: value + 1 for name, value in own.items()}]
        assert sum(bool(run.statistics_of(task)) for task in run.tasks) == expected


class Whole(Method):
    """A method whose state is read whole, by ``dict``."""

    name = "whole"

    def state_dict(self):
        return {"steps": 3, "start": torch.ones(2), "later": None}

    def load_state_dict(self, state):
        self.state = dict(state)


class Ignoring(Whole):
    def load_state_dict(self, state):
        self.steps = state["steps"]


class Missing(Whole):
    def load_state_dict(self, state):
        self.steps, self.rate = {**state}["steps"], state["rate"]


@pytest.mark.parametrize(("kind", "names"), [(Whole, ""), (Ignoring, "start"), (Missing, "rate")])
def test_what_a_method_does_not_take_up_of_its_state_is_refused_by_name(kind: type[Method], names: str) -> None:
    words = ["dataset=digits", "model=vit_tiny", f"method=tests.unit.test_run_checkpoint:{kind.__name__}"]
    run = build_components(parse(words).config, Accelerator(cpu=True), "32")
    analysis = SimpleNamespace(state=dict, load_state=lambda state: None)
    checkpoint = RunCheckpoint(run, analysis, run.backbone.state_dict(), Path())  # type: ignore[arg-type]
    taken = checkpoint.take("stopped", RunState(), None, {})
    resumed = ResumedRun(Path(), source="a checkpoint", state=taken.state, values=taken.tensors)

    def go_on() -> None:
        checkpoint.restore(resumed)
        checkpoint.check_method(resumed.source)

    if not names:
        go_on()
        assert run.method.state["start"].tolist() == [1, 1]  # type: ignore[attr-defined]
        return
    with pytest.raises(NotFoundError, match=f"a checkpoint, method=.*{names}"):
        go_on()


VIT = ["dataset=digits", "model=vit_tiny", "model.use_lora=false"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*VIT], ""),
        ([*VIT, "model.config.hidden_dropout_prob=0.1"], ""),
        ([*VIT, "model.config.attention_probs_dropout_prob=0.1"], "attention dropout or stochastic depth is drawn"),
        ([*VIT, "model.use_lora=true", "model.lora.dropout=0.1"], ""),
        (RESNET, "batch norm in training is over each rank's own batch"),
        ([*RESNET, "model.norm_statistics=frozen"], ""),
    ],
)
def test_what_another_number_of_ranks_changes_is_said(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_components(parse([*words, "method=finetune"]).config, Accelerator(cpu=True), "32")
    analysis = SimpleNamespace(state=dict, load_state=lambda state: None)
    checkpoint = RunCheckpoint(run, analysis, run.backbone.state_dict(), Path())  # type: ignore[arg-type]
    taken = checkpoint.take("stopped", RunState(), None, {})
    own = {name: value for name, value in taken.tensors.items() if name.startswith("ranks/0")}
    taken.tensors.update({name.replace("ranks/0", "ranks/1", 1): value for name, value in own.items()})
    for ranks in (1, 2):
        state = {**taken.state, "ranks": taken.state["ranks"] * ranks}
        checkpoint.restore(ResumedRun(Path(), source="a checkpoint", state=state, values=taken.tensors))
        found = capsys.readouterr().out
        assert found == "" if ranks == 1 or not said else f"was on 2 ranks, it goes on with 1: {said}" in found
