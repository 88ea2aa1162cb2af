"""Accuracy and mean loss of a model on a data set, over all ranks, every sample counted once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nostalgia.data.stream import TaskLoader
from nostalgia.models.objective import Objective


@dataclass(frozen=True)
class Score:
    """Accuracies are fractions; loss is the mean cross-entropy a sample."""

    accuracy: float  # the task is known: arg-max over its own head
    loss: float
    correct: int
    num_samples: int
    class_incremental: float  # the task is not known: arg-max over all heads of the model


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: TaskLoader,
    accelerator: Accelerator,
    max_batches: int | None = None,
    pause: Callable[[], None] | None = None,
    *,
    head: int | None = None,
) -> Score:
    """Evaluate ``model`` (logits of one head or several) in evaluation mode; its training mode is restored.

    ``head`` is the place of the images' head among the model's, where the loader does not say it. Every rank runs the
    same number of batches, so a model wrapped by FSDP2 may be evaluated too. ``pause`` is called before each batch: where
    a run that is asked to stop may do so.
    """
    modes = [(module, module.training) for module in model.modules()]
    objective = Objective()
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # loss, correct, correct of all, samples
    try:
        with accelerator.autocast():
            for i, step in enumerate(loader.epoch(0)):
                if i == max_batches:
                    break
                if pause is not None:
                    pause()
                for batch in step.micro_batches:
                    if head is not None:
                        batch.tasks = torch.full_like(batch.tasks, head)
                    output = objective(model, batch)
                    every = correct_of_all_heads(output.logits, batch.labels, batch.tasks, batch.valid)
                    sums += torch.stack([output.loss.double(), output.correct, every, batch.valid.sum()])
    finally:
        for module, mode in modes:
            module.training = mode
    loss, correct, every_head, total = accelerator.reduce(sums, "sum").tolist()
    return Score(correct / total, loss / total, round(correct), round(total), every_head / total)


def correct_of_all_heads(logits: tuple[Tensor, ...], labels: Tensor, heads: Tensor, valid: Tensor) -> Tensor:
    """Samples whose largest logit over all heads is their label's of their own head (0-dim int64).

    ``labels`` (B,) within the head, ``heads`` (B,) its place among ``logits``; rows that are not ``valid`` do not count.
    """
    widths = torch.tensor([0, *(outputs.shape[1] for outputs in logits)], device=labels.device)
    targets = labels + widths.cumsum(0)[heads]
    return (valid & (torch.cat(logits, dim=1).argmax(dim=1) == targets)).sum()
