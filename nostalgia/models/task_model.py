"""The module that is wrapped and trained: a shared backbone with the heads in training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class TaskModel(nn.Module):
    """``backbone`` and heads: the present task's alone, or those of all tasks.

    A head that is neither trained nor frozen does not belong here: a parameter without a gradient is an error under DDP.
    """

    def __init__(self, backbone: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(heads)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Logits (B, classes of the head) of each head, for images (B, C, H, W).

        ``keys`` (B,) int32 decide what dropout takes from each sample; without them torch's generator does.
        """
        dropout = getattr(self.backbone, "dropout", None)
        if dropout is not None:
            dropout.samples = keys
        features = self.backbone(images)
        return tuple(head(features) for head in self.heads)
