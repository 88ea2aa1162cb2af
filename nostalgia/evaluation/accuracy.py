"""Accuracy and mean loss of a model on a data set, over all ranks, every sample counted once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from nostalgia.data.stream import TaskLoader
from nostalgia.training.task_model import count_correct, loss_sum


@dataclass(frozen=True)
class Score:
    """Accuracy is a fraction; loss is the mean cross-entropy a sample."""

    accuracy: float
    loss: float
    correct: int
    num_samples: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: TaskLoader,
    accelerator: Accelerator,
    max_batches: int | None = None,
    pause: Callable[[], None] | None = None,
) -> Score:
    """Evaluate ``model`` (logits of one head or several) in evaluation mode; its training mode is restored.

    Every rank runs the same number of batches, so a model wrapped by FSDP2 may be evaluated too. ``pause`` is called
    before each batch: where a run that is asked to stop may do so.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # loss, correct, samples
    try:
        with accelerator.autocast():
            for i, step in enumerate(loader.epoch(0)):
                if i == max_batches:
                    break
                if pause is not None:
                    pause()
                for batch in step.micro_batches:
                    logits = model(batch.images)
                    sums += torch.stack(
                        [loss_sum(logits, batch).double(), count_correct(logits, batch), batch.valid.sum()]
                    )
    finally:
        for module, mode in modes:
            module.training = mode
    loss, correct, total = accelerator.reduce(sums, "sum").tolist()
    return Score(accuracy=correct / total, loss=loss / total, correct=round(correct), num_samples=round(total))
