"""The program, but for one number of one parameter that changes on rank 1 in mid-run, as faulty hardware would."""

from __future__ import annotations

import os
from typing import Any

import torch

import nostalgia.training.loop as loop
from tests.ranks import train

STEP = 3


def corrupt(backbone: torch.nn.Module, parameter: str) -> None:
    """Change one number of a parameter by about what one bit can."""
    values = backbone.get_parameter(parameter).data.view(-1)
    values[0] += 1e-6 * (1.0 + values[0].abs())


def diverging(step: Any, parameter: str, calls: list[None]) -> Any:
    def train_step(model: Any, *given: Any, **options: Any) -> Any:
        result = step(model, *given, **options)
        calls.append(None)
        if len(calls) == STEP and os.environ["RANK"] == "1":
            corrupt(model.module.backbone, parameter)
        return result

    return train_step


def main(parameter: str, words: list[str]) -> int:
    loop.train_step = diverging(loop.train_step, parameter, [])
    return train(words)
