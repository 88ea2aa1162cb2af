"""Linear heads, one a task: made, grown when a task comes back with more classes, saved and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nostalgia.errors import NotFoundError, UsageError
from nostalgia.models.seeding import seeded
from nostalgia.utils.tensor_files import read_tensors

INITIAL_STD = 0.01


def make_head(feature_dim: int, num_classes: int, seed: int) -> nn.Linear:
    """Head with weight (num_classes, feature_dim) ~ N(0, 0.01^2) and zero bias, a function of ``seed`` alone.

    Small logits at first keep the gradient that a fresh head sends into the backbone small.
    """
    if feature_dim < 1 or num_classes < 1:
        raise UsageError(f"a head needs features and classes, not {feature_dim} features and {num_classes} classes")
    with seeded(seed):
        head = nn.Linear(feature_dim, num_classes)
        nn.init.normal_(head.weight, std=INITIAL_STD)
        nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def expand_head(head: nn.Linear, num_classes: int, seed: int) -> nn.Linear:
    """New head of ``num_classes`` rows: the first are those of ``head``, the others as ``make_head`` makes
    them.

    Keeps device, dtype and ``requires_grad``; raises UsageError when there would be fewer classes than
    before.
    """
    if num_classes < head.out_features:
        raise UsageError(
            f"a head of {head.out_features} classes cannot shrink to {num_classes}: a task that comes back "
            "must list its old classes first, new ones after"
        )
    grown = make_head(head.in_features, num_classes, seed).to(head.weight.device, head.weight.dtype)
    grown.weight[: head.out_features] = head.weight
    grown.bias[: head.out_features] = head.bias
    return grown.requires_grad_(head.weight.requires_grad)


def copy_head(head: nn.Module) -> dict[str, Tensor]:
    """Copies of a head's weight (C, D) and bias (C,)."""
    return {name: value.detach().clone() for name, value in head.state_dict().items()}


def head_with(values: Mapping[str, Tensor]) -> nn.Linear:
    """A frozen head with the weight (C, D) and bias (C,) that `copy_head` gave."""
    weight = values["weight"]
    head = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], dtype=weight.dtype, device=weight.device)
    head.load_state_dict(dict(values))
    return head.requires_grad_(False)


def save_heads(heads: Mapping[str, nn.Linear], file: Path) -> None:
    """Write ``<name>.weight`` (C, D) and ``<name>.bias`` (C,) of every head to one safetensors file."""
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous().clone()  # tasks may share a head
        for name, head in heads.items()
        for key, tensor in head.state_dict().items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


def load_heads(file: Path) -> dict[str, nn.Linear]:
    """Read what ``save_heads`` wrote, by name; raises NotFoundError when it cannot be read."""
    tensors = read_tensors(file, "heads")
    heads: dict[str, nn.Linear] = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        weight, bias = tensors.pop(f"{name}.weight", None), tensors.pop(f"{name}.bias", None)
        if weight is None or bias is None or not _make_a_head(weight, bias):
            raise NotFoundError(f"{file}: {name[:80]!r} is no head: a weight (C, D) and a bias (C,) of numbers")
        head = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], dtype=weight.dtype)
        head.load_state_dict({"weight": weight, "bias": bias})
        heads[name] = head
    return heads


def _make_a_head(weight: Tensor, bias: Tensor) -> bool:
    shapes = weight.ndim == 2 and bias.shape == weight.shape[:1] and weight.numel() > 0
    return shapes and weight.is_floating_point() and bias.dtype == weight.dtype
