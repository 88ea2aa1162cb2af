"""The program, but for one number of one parameter that changes on rank 1 in mid-run, as faulty hardware would."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

import nostalgia.training.loop as loop
from nostalgia.train import main

STEP = 3


def corrupt(backbone: torch.nn.Module) -> None:
    """Change one number of the parameter that the first argument names, by about what one bit can."""
    values = backbone.get_parameter(sys.argv[1]).data.view(-1)
    values[0] += 1e-6 * (1.0 + values[0].abs())


def diverging(step: Any, calls: list[None]) -> Any:
    def train_step(model: Any, *given: Any, **options: Any) -> Any:
        result = step(model, *given, **options)
        calls.append(None)
        if len(calls) == STEP and os.environ["RANK"] == "1":
            corrupt(model.module.backbone)
        return result

    return train_step


if __name__ == "__main__":
    loop.train_step = diverging(loop.train_step, [])
    sys.exit(main(sys.argv[2:]))
