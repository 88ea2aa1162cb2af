"""The module that is wrapped and trained: a shared backbone with the heads in training, and its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nostalgia.data.stream import Batch


class TaskModel(nn.Module):
    """``backbone`` and the heads that are trained with it: one, or all tasks' for joint training.

    Only heads in training belong here: a parameter that gets no gradient is an error under DDP.
    """

    def __init__(self, backbone: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, classes of the head) of each head, for images (B, C, H, W)."""
        features = self.backbone(images)
        return tuple(head(features) for head in self.heads)


def loss_sum(logits: Sequence[Tensor], batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over the valid samples, each under its own task's head (0-dim tensor).

    A padding row has weight zero, so it counts nowhere; a head without a sample here still gets a (zero) gradient.
    """
    total = logits[0].new_zeros((), dtype=torch.promote_types(logits[0].dtype, torch.float32))
    for head, outputs in enumerate(logits):
        mine = batch.valid & (batch.tasks == head)
        labels = torch.where(mine, batch.labels, 0)
        losses = F.cross_entropy(outputs.to(total.dtype), labels, reduction="none", label_smoothing=label_smoothing)
        total = total + torch.where(mine, losses, 0.0).sum()
    return total


def count_correct(logits: Sequence[Tensor], batch: Batch) -> Tensor:
    """Valid samples whose own head's largest logit is their label (0-dim int64 tensor)."""
    correct = batch.labels.new_zeros(())
    for head, outputs in enumerate(logits):
        mine = batch.valid & (batch.tasks == head)
        correct = correct + (mine & (outputs.argmax(dim=1) == batch.labels)).sum()
    return correct
