"""The training objective: one object that knows a batch's loss, its correct answers and its Gauss-Newton form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nostalgia.data.stream import Batch
from nostalgia.errors import UsageError


@dataclass
class Output:
    """What a forward pass gives; a method may change ``loss`` before it is differentiated."""

    loss: Tensor  # 0-dim, summed over the batch's samples by their weights
    correct: Tensor  # 0-dim int64, samples of positive weight that are classified correctly
    logits: tuple[Tensor, ...]  # (B, classes) of each head of the model


class Objective:
    """Cross-entropy of each sample under its own task's head, summed over samples by their weights.

    ``label_smoothing`` is that of `torch.nn.functional.cross_entropy`. Calling the objective runs the model.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Batch) -> Output:
        """Run ``model`` (a `TaskModel`, wrapped or not) on a batch."""
        keys = batch.keys() if model.training else None
        logits = model(batch.images) if keys is None else model(batch.images, keys)
        return Output(self.loss(logits, batch), self.correct(logits, batch).detach(), logits)

    def loss(self, logits: Sequence[Tensor], batch: Batch) -> Tensor:
        """Weighted sum of the samples' losses (0-dim, float32 at least).

        A row of weight zero counts nowhere; a head without a sample here still gets a (zero) gradient.
        """
        total = logits[0].new_zeros((), dtype=torch.promote_types(logits[0].dtype, torch.float32))
        for head, outputs in enumerate(logits):
            mine = (batch.weights > 0) & (batch.tasks == head)
            labels = torch.where(mine, batch.labels, 0)
            losses = F.cross_entropy(
                outputs.to(total.dtype), labels, reduction="none", label_smoothing=self.label_smoothing
            )
            total = total + torch.where(mine, losses * batch.weights, 0.0).sum()
        return total

    def correct(self, logits: Sequence[Tensor], batch: Batch) -> Tensor:
        """Samples of positive weight whose own head's largest logit is their label (0-dim int64)."""
        correct = batch.labels.new_zeros(())
        for head, outputs in enumerate(logits):
            mine = (batch.weights > 0) & (batch.tasks == head)
            correct = correct + (mine & (outputs.argmax(dim=1) == batch.labels)).sum()
        return correct

    def loss_fn(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Summed loss and number of samples, as `HessianOperator` wants them; the batch holds no padding."""
        return self.loss(model(batch.images), batch), len(batch)

    def forward_fn(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of the one head that the batch's samples have, and labels (B,), as `GGNOperator` wants them.

        Raises UsageError for a batch whose samples have several heads: no one of them has the loss that is trained.
        """
        logits = model(batch.images)
        if len(logits) == 1:
            return logits[0], batch.labels
        if batch.head is not None:  # a batch that `torch.func.vmap` has cut up cannot be looked at
            return logits[batch.head], batch.labels
        heads = batch.tasks.unique().tolist()
        if len(heads) != 1:
            raise UsageError(
                f"the Gauss-Newton or Fisher matrix of a batch under {len(heads)} heads ({', '.join(map(str, heads))}): give "
                "batches of one head each, as TaskContext.samples does, or take curvature.kind=hessian"
            )
        return logits[heads[0]], batch.labels
