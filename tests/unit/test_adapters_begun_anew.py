"""Which methods merge adapters after each task, by model.lora.merge."""

from __future__ import annotations

import pytest

from nostalgia.config import parse
from nostalgia.errors import UsageError
from nostalgia.experiment.components import checked_method, merges_adapters

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
        assert merges_adapters(config, checked_method(config)) is expected, merge


def test_without_adapters_nothing_is_merged() -> None:
    config = parse(["model=vit_tiny", "model.use_lora=false", "method=kronecker"]).config
    assert not merges_adapters(config, checked_method(config))


def test_forgetting_is_not_predicted_of_merged_adapters() -> None:
    words = [*LORA, "method=kronecker", "analysis.predict_forgetting=true"]
    with pytest.raises(UsageError, match=r"predict_forgetting=true with adapters that are merged.*merge=never"):
        checked_method(parse(words).config)
    checked_method(parse([*words, "model.lora.merge=never"]).config)
