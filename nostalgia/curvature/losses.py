"""Losses of a network's outputs whose second derivative in the outputs is known in closed form."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nostalgia.errors import UsageError

IGNORED = -100  # the label `torch.nn.functional.cross_entropy` leaves out


class OutputLoss(Protocol):
    """A loss summed over samples, of outputs (..., C) and targets."""

    def total(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """The summed loss (0-dim) and the number of samples it is summed over."""

    def curvature(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        """Second derivative of the summed loss in the outputs, times u; all (..., C)."""


class CrossEntropy:
    """Softmax cross-entropy; curvature diag(p) - p p^T a sample.

    Targets are classes (...), `IGNORED` ones left out, or probabilities (..., C).
    """

    def total(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).flatten(0, -2)
        if targets.is_floating_point():
            return F.cross_entropy(outputs, targets.flatten(0, -2), reduction="sum"), len(outputs)
        loss = F.cross_entropy(outputs, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss, int((targets != IGNORED).sum())

    def curvature(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        wide = torch.promote_types(outputs.dtype, torch.float32)
        p, u = outputs.to(wide).softmax(dim=-1), u.to(wide)
        mass = targets.sum(-1) if targets.is_floating_point() else targets != IGNORED
        return p * (u - (p * u).sum(dim=-1, keepdim=True)) * mass[..., None].to(wide)


class SquaredError:
    """Squared error summed over the outputs of a sample; curvature 2 I. The first dimension counts samples."""

    def total(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return (outputs - targets).square().sum(), len(outputs)

    def curvature(self, outputs: Tensor, targets: Tensor, u: Tensor) -> Tensor:
        return 2 * u


LOSSES: dict[str, OutputLoss] = {"cross_entropy": CrossEntropy(), "mse": SquaredError()}


def output_loss(name: str) -> OutputLoss:
    """The loss called ``name``; raises UsageError with the list otherwise."""
    if name not in LOSSES:
        raise UsageError(f"loss={name!r}: allowed are {', '.join(LOSSES)}")
    return LOSSES[name]
