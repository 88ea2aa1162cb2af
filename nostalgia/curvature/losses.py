"""Losses of a network's outputs whose second derivative in the outputs is known in closed form."""

from __future__ import annotations

from typing import Any, Protocol

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
    """Softmax cross-entropy; curvature diag(p) - p p^T a sample, whatever the ``label_smoothing``.

    Targets are classes (...), `IGNORED` ones left out, or probabilities (..., C).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def total(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).flatten(0, -2)
        options: dict[str, Any] = {"reduction": "sum", "label_smoothing": self.label_smoothing}
        if targets.is_floating_point():
            return F.cross_entropy(outputs, targets.flatten(0, -2), **options), len(outputs)
        loss = F.cross_entropy(outputs, targets.flatten(), ignore_index=IGNORED, **options)
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


LOSSES = ("cross_entropy", "mse")


def output_loss(name: str, label_smoothing: float = 0.0) -> OutputLoss:
    """The loss called ``name``; raises UsageError with the list otherwise."""
    if name not in LOSSES:
        raise UsageError(f"loss={name!r}: allowed are {', '.join(LOSSES)}")
    if name == "cross_entropy":
        return CrossEntropy(label_smoothing)
    if label_smoothing:
        raise UsageError(f"label_smoothing={label_smoothing} goes with loss='cross_entropy'; it is {name!r}")
    return SquaredError()
