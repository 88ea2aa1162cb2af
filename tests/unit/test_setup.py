"""What a run is made of, from its configuration."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

from nostalgia.config import parse
from nostalgia.data.prepared import View
from nostalgia.data.resizing import Resizing
from nostalgia.errors import NostalgiaError, UsageError
from nostalgia.experiment.components import build_components
from nostalgia.experiment.data_check import absolute_paths
from nostalgia.experiment.forgetting_observer import ForgettingObserver
from nostalgia.experiment.method_choice import complete_method
from nostalgia.experiment.task_data import load_tasks, task_loader
from nostalgia.methods.loading import make_method


def test_tasks_trained_together_keep_their_own_augmentation() -> None:
    accelerator, words = Accelerator(cpu=True), ["dataset=digits", "model=vit_tiny", "method=joint"]
    config = parse(words).config
    first, second = load_tasks(config, accelerator)
    tasks = [dataclasses.replace(first, augment="flip"), dataclasses.replace(second, augment="none")]
    view = View(Resizing(8), (0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    together = task_loader(config, accelerator, view, tasks, train=True, name="joint")
    assert together.augmentation.policies == ("flip", "none")
    chosen = parse([*words, "dataset.augment=shift"]).config
    assert task_loader(chosen, accelerator, view, tasks, train=True).augmentation.policies == ("shift", "shift")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nostalgia.top_k=0"], "method.top_k=0: allowed is a finite number, 1 or more"),
        (["nostalgia.top_k=8", "nostalgia.k_max=4"], "below"),
        (["nostalgia.top_k=8", "nostalgia.max_products=7"], "curvature.max_products=7: allowed with method.top_k=8"),
        (["nostalgia.merge=average", "nostalgia.k_max=64"], "bounds method.merge=union"),
        (["nostalgia.projection_start_task=3"], "there are 2 tasks: nothing would be projected"),
        (["method.project=sideways"], "constrained"),
        (["method.topk=3"], "did you mean top_k"),
        (["method=ewc", "method.strength=-1"], "method.strength=-1.0: allowed is a finite number, 0 or more"),
        (["method=ewc", "method.labels=real"], "sampled, true"),
        (["method=finetune", "method.strength=1"], "unknown key method.strength; it has no options"),
        (["method.name=ewcc"], "did you mean ewc"),
        (
            ["method=ewc_lora", "model.use_lora=false"],
            "method=ewc_lora: it begins adapters anew, and the network has none",
        ),
        (["method=json:JSONDecoder"], "not a class derived from nostalgia.methods.Method"),
    ],
)
def test_options_that_a_method_does_not_allow_are_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        complete_method(parse(words).config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


OWN = """
from nostalgia.methods import Method

class Fine(Method):
    pass

class Fails(Method):
    def __init__(self, config, seed=0):
        self.missing["x"]

class Numbered(Method):
    name = 5

class Path(Method):
    name = "a/b c"

class Options(Method):
    Config = 3
"""


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("import nowhere_at_all", "Fine", "own_text.py, line 1: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def f(:", "Fine", "own_text.py, line 1: SyntaxError: "),
        ("raise SystemExit(7)", "Fine", "own_text.py, line 1: SystemExit: 7"),
        (OWN, "Nope", "own_text.py has no Nope"),
        (OWN, "Fails", "own_text.py, line 9: AttributeError: 'Fails' object has no attribute 'missing'"),
        (OWN, "Numbered", "its name is 5; allowed are letters"),
        (OWN, "Path", "its name is 'a/b c'; allowed are letters"),
        (OWN, "Options", "its Config is 3; allowed is a dataclass"),
        (OWN, "Fine", ""),
    ],
)
def test_a_module_of_the_users_that_does_not_work_is_one_line(
    text: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_text.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_text", raising=False)
    if not message:
        assert make_method(f"own_text:{name}", {}, 0).name == name
        return
    with pytest.raises(NostalgiaError) as caught:
        make_method(f"own_text:{name}", {}, 0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_of_a_method_come_from_its_class_the_suite_the_word_for_all_and_the_command_line() -> None:
    def options(*words: str) -> dict[str, object]:
        config = parse(["--suite", "demo", *words]).config
        complete_method(config)
        assert config.methods == {}
        return config.method

    assert options()["top_k"] == 16  # of the suite
    assert options("nostalgia.top_k=7")["top_k"] == 7
    assert options("methods.nostalgia.top_k=6")["top_k"] == 6
    assert options("nostalgia.top_k=7", "method.top_k=9")["top_k"] == 9
    assert options("method=finetune", "nostalgia.top_k=7") == {"name": "finetune"}
    assert options("method=ewc")["strength"] == 100.0  # of the class
    assert options("method.name=ewc", "method.strength=3")["strength"] == 3.0


def test_a_batch_norm_with_one_value_per_channel_is_refused_before_training() -> None:
    words = ["dataset=digits", "model=resnet18", "dataset.image_size=32", "model.pretrained=false", "method=finetune"]
    accelerator = Accelerator(cpu=True)
    with pytest.raises(
        UsageError, match=r"dataset.batch_size=1: a batch norm of .* single value per channel at 32 x 32"
    ):
        build_components(parse([*words, "dataset.batch_size=1"]).config, accelerator, "32")
    for word in ("dataset.batch_size=2", "dataset.image_size=64", "model.norm_statistics=frozen"):
        build_components(parse([*words, "dataset.batch_size=1", word]).config, accelerator, "32")


def test_folders_mean_the_same_in_another_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "digits", "net"):
        (tmp_path / name).mkdir()
    tasks = "experiment.tasks=[plain,digits,{dataset: plain},nowhere]"
    words = ["dataset.root=here", "dataset.entries.mine.path=own", "dataset.entries.hub.hub_id=a/b", tasks]
    config = parse([*words, "model=vit", "model.model_id=net"]).config
    absolute_paths(config)
    plain = str(tmp_path / "plain")
    assert config.experiment.tasks == [plain, "digits", {"dataset": plain}, "nowhere"]  # digits is a data set's name
    assert config.model.model_id == str(tmp_path / "net")
    (tmp_path / "w.pt").touch()
    config.model.model_id = "w.pt"
    absolute_paths(config)
    assert config.model.model_id == str(tmp_path / "w.pt")
    assert config.dataset.root == str(tmp_path / "here")
    assert config.dataset.entries == {"mine": {"path": str(tmp_path / "own")}, "hub": {"hub_id": "a/b"}}


def test_options_of_adapters_that_are_not_used_are_noted() -> None:
    unused = parse(["--suite", "demo", "model.lora.r=4", "model.lora.dropout=0"]).config
    for _ in range(2):  # the second time as the run's folder has it
        assert complete_method(unused) == ["without model.use_lora=true of no effect: model.lora.r, model.lora.dropout"]
    assert complete_method(parse(["--suite", "demo"]).config) == []
    assert complete_method(parse(["dataset=digits", "model=vit", "model.lora.r=4"]).config) == []


def test_more_directions_to_predict_with_than_parameters_are_refused_before_training(tmp_path: Path) -> None:
    config = parse(["--suite", "demo", "analysis.predict_forgetting=true", "analysis.top_k=6"]).config
    run: Any = SimpleNamespace(config=config, space=SimpleNamespace(size=5))
    with pytest.raises(UsageError, match=r"analysis.top_k=6: allowed is 1 to 5"):
        ForgettingObserver(run, tmp_path, print, Mock(), Mock())


def test_limits_that_the_prediction_s_own_eigenpairs_do_not_fit_are_refused_before_training() -> None:
    words = ["--suite", "demo", "analysis.predict_forgetting=true", "analysis.top_k=6", "curvature.max_basis=7"]
    with pytest.raises(UsageError, match=r"curvature.max_basis=7: allowed with analysis.top_k=6 is 8 or more"):
        complete_method(parse([*words, "method=finetune"]).config)
    complete_method(parse([*words, "method=kronecker"]).config)  # which predicts with its own factors
