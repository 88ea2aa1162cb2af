"""Which methods merge adapters after each task, by model.lora.merge."""

from __future__ import annotations

import pytest

from nostalgia.config import parse
from nostalgia.errors import UsageError
from nostalgia.experiment.method_choice import chosen_method, complete_method, merges_adapters

LORA = ["model=vit", "model.use_lora=true"]


@pytest.mark.parametrize(
    ("words", "auto", "never"),
    [
        (["method=kronecker"], True, False),
        (["method=nostalgia"], True, False),
        (["method=nostalgia", "method.tail=none"], False, False),
        (["method=nostalgia", "method.tail=diagonal"], False, False),
        (["method=finetune"], False, False),
        (["method=ewc_lora"], True, True),
    ],
)
def test_auto_is_what_the_method_prefers(words: list[str], auto: bool, never: bool) -> None:
    for merge, expected in (("auto", auto), ("never", never), ("task", True)):
        config = parse([*LORA, *words, f"model.lora.merge={merge}"]).config
        assert merges_adapters(config, chosen_method(config)) is expected, merge


@pytest.mark.parametrize("tail", ["diagonal", "isotropic"])
def test_a_tail_that_holds_positions_does_not_either(tail: str) -> None:
    with pytest.raises(UsageError, match=rf"model.lora.merge=task with method=nostalgia method.tail={tail}: "):
        complete_method(parse([*LORA, "method=nostalgia", f"method.tail={tail}", "model.lora.merge=task"]).config)


@pytest.mark.parametrize("method", ["ewc", "si", "l2sp", "nostalgia_ewc", "averaging"])
def test_what_holds_positions_does_not_begin_anew(method: str) -> None:
    with pytest.raises(UsageError, match=rf"model.lora.merge=task with method={method}: .*use model.lora.merge=never"):
        complete_method(parse([*LORA, f"method={method}", "model.lora.merge=task"]).config)
    config = parse([*LORA, f"method={method}"]).config
    complete_method(config)
    assert config.model.lora.merge == "never"


def test_what_auto_became_is_kept() -> None:
    """Not where there is one task, or one round of all of them: nothing begins anew there."""
    for words, expected in (
        ([], "task"), (["experiment.tasks=[{dataset: digits}]"], "never"), (["method=joint"], "never"),
    ):  # fmt: skip
        config = parse([*LORA, "method=kronecker", *words]).config
        complete_method(config)
        assert config.model.lora.merge == expected


def test_without_adapters_nothing_is_merged() -> None:
    config = parse(["model=vit_tiny", "model.use_lora=false", "method=kronecker"]).config
    assert not merges_adapters(config, chosen_method(config))
