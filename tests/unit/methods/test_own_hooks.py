"""What a run says of a class of the user's own before it trains: its hooks, options under its name, what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nostalgia.checkpoint.codec import ReadOnce
from nostalgia.config import parse
from nostalgia.errors import UsageError
from nostalgia.experiment.method_choice import complete_method
from nostalgia.methods.loading import method_class

CLASSES = """
from dataclasses import dataclass
from nostalgia.methods import Method, option

@dataclass(frozen=True)
class Options:
    strength: float = option(0.1, low=0)

class Pull(Method):
    name = "pull"
    Config = Options
    def gradients(self): pass
    def end_task(self, task): pass
    def bytes_of(self): return 0

class Misspelt(Method):
    def gradient(self): pass
    def on_task_end(self, task): pass

class Signature(Method):
    def gradients(self, task): pass

class Forgets(Method):
    def state_dict(self): return {"x": 1}
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hooked.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(str(tmp_path))


def completed(*words: str) -> tuple[dict[str, object], list[str]]:
    config = parse(["--suite", "demo", *words]).config
    notes = complete_method(config)
    return config.method, notes


def test_what_no_checkpoint_would_hold_is_noted() -> None:
    _, (note,) = completed("method=hooked:Pull")
    assert note.endswith(
        "no state_dict: what begin_task and end_task keep is in no checkpoint, and gone where a run resumes"
    )
    _, (note,) = completed("method=hooked:Misspelt")
    assert "no state_dict" not in note


def test_its_hooks_are_named_and_what_is_nearly_one() -> None:
    _, (note,) = completed("method=hooked:Pull")
    assert note.startswith("hooks of Pull: gradients, end_task")
    _, (note,) = completed("method=hooked:Misspelt")
    assert "hooks of Misspelt: none, which is fine-tuning" in note
    assert "gradient is none (did you mean gradients?)" in note
    assert "on_task_end is none (did you mean end_task?)" in note
    assert completed("method=finetune")[1] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Signature", "gradients is called as gradients(self)"),
        ("Forgets", "it has state_dict but no load_state_dict"),
    ],
)
def test_what_cannot_be_called_or_resumed_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        method_class(f"hooked:{name}")
    assert message in str(caught.value)


def test_options_under_its_name_reach_it() -> None:
    method, _ = completed("method=hooked:Pull", "methods.pull.strength=7")
    assert method["strength"] == 7
    method, _ = completed("method=hooked:Pull", "methods.pull.strength=7", "method.strength=3")
    assert method["strength"] == 3
    with pytest.raises(UsageError, match="strengh"):
        completed("method=hooked:Pull", "methods.pull.strengh=7")


def test_options_of_no_method_here_are_noted() -> None:
    method, notes = completed("method=hooked:Pull", "methods.pul.strength=7", "methods.ewc.strength=3")
    assert method["strength"] == 0.1
    assert notes[0] == "methods.pul is of no method here, its options have no effect; did you mean pull?"
    assert not any("ewc" in note for note in notes)


@pytest.mark.parametrize("word", ["methods.ewc.strengh=3", "methods.ewc.strength=-3"])
def test_options_of_another_method_are_checked_all_the_same(word: str) -> None:
    with pytest.raises(UsageError, match=r"methods\.ewc\.streng"):
        completed("method=finetune", word)


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "defaults:\n- override /dataset: digits\n- override /model: vit_digits\nexperiment: {name: mine, num_tasks: 2}\n"
        "methods: {pull: {strength: 5}}\n"
    )
    request = parse(["--suite", str(file), "method=hooked:Pull", "train.epochs=3"])
    assert (request.suite, request.config.experiment.name, request.config.train.epochs) == ("mine", "mine", 3)
    assert request.config.model.name == "vit_digits"
    complete_method(request.config)
    assert request.config.method["strength"] == 5
    with pytest.raises(UsageError, match=r"--suite no\.yaml: no such file"):
        parse(["--suite", "no.yaml"])
    file.write_text("a: [")
    with pytest.raises(UsageError, match="cannot be read"):
        parse(["--suite", str(file)])
    file.write_text("methods: {pull: {strength: 1e-4}}\n")  # a number to OmegaConf, a text to PyYAML
    config = parse(["--suite", str(file), "method=hooked:Pull"]).config
    complete_method(config)
    assert config.method["strength"] == 1e-4
    for text, message in (
        ("- a\n", "it is a list"),
        ("only words\n", "only words"),
        ("a: 1\na: 2\n", "cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            parse(["--suite", str(file)])
    file.write_text("experiment: {nam: x}")
    with pytest.raises(UsageError, match="nam"):
        parse(["--suite", str(file)])


def test_a_state_that_is_changed_is_whole_the_second_time() -> None:
    state = ReadOnce({"mean": {"w": torch.zeros(2)}, "seen": [1], "left": 3})
    first = state.fresh()
    first["mean"]["w"] += 1
    first["mean"]["x"] = 2
    first["seen"].append(2)
    second = state.fresh()
    assert torch.equal(second["mean"]["w"], torch.zeros(2))
    assert set(second["mean"]) == {"w"}
    assert second["seen"] == [1]
    assert state.unread == ["left"]
