"""Tensors from safetensors files: the format cannot hold code, and what cannot be a network's numbers is refused."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nostalgia.errors import NotFoundError


def read_tensors(file: Path, what: str) -> dict[str, Tensor]:
    """The tensors of ``file`` by name, all finite; raises NotFoundError, calling them ``what``, otherwise."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise NotFoundError(f"{file}: {what} cannot be read, not a whole safetensors file ({reason})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFoundError(f"{file}: {what}: {name[:80]!r} holds values that are not finite")
    return tensors
