"""Accuracy of one task class by class, counted as `accuracy.evaluate` counts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nostalgia.data.stream import TaskLoader
from nostalgia.models.objective import Objective
from nostalgia.models.task_model import TaskModel


@dataclass(frozen=True)
class ClassScores:
    """Images and correct answers by class; over all ranks, every sample once."""

    classes: tuple[str, ...]
    counts: list[int]
    correct: list[int]
    loss: float  # mean cross-entropy a sample

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.num_samples

    def of_class(self, index: int) -> float | None:
        """Accuracy on one class; None where it has no images."""
        return self.correct[index] / self.counts[index] if self.counts[index] else None


@torch.no_grad()
def evaluate_classes(
    backbone: nn.Module,
    head: nn.Linear,
    classes: Sequence[str],
    loader: TaskLoader,
    accelerator: Accelerator,
    max_batches: int | None = None,
) -> ClassScores:
    """Evaluate one task in evaluation mode, on all ranks; ``classes`` are the head's outputs."""
    model = TaskModel(backbone, [head]).eval()
    size = head.out_features
    sums = torch.zeros(1 + 2 * size, dtype=torch.float64, device=accelerator.device)  # loss, images, correct
    with accelerator.autocast():
        for i, step in enumerate(loader.epoch(0)):
            if i == max_batches:
                break
            for batch in step.micro_batches:
                logits = model(batch.images)
                labels, right = batch.labels[batch.valid], _right(logits[0], batch.labels)[batch.valid]
                sums[0] += Objective().loss(logits, batch).double()
                sums[1 : 1 + size] += torch.bincount(labels, minlength=size)
                sums[1 + size :] += torch.bincount(labels[right], minlength=size)
    loss, *numbers = accelerator.reduce(sums, "sum").tolist()
    counts = [round(n) for n in numbers]
    return ClassScores(tuple(classes), counts[:size], counts[size:], loss / sum(counts[:size]))


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=1) == labels
