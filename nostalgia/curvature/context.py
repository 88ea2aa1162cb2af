"""What a curvature product changes for its duration, and puts back whatever happens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nostalgia.errors import UsageError

PRECISIONS = ("float32", "float64", "tf32", "bf16")


@contextmanager
def product_context(precision: str, device: torch.device) -> Iterator[None]:
    """Random state kept, matrix products in ``precision``, attention in the kernel that has a second derivative."""
    devices = [device] if device.type == "cuda" else []
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    saved = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Training's own autocast must not reach in: products have a precision of their own.
        stack.enter_context(
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
        )
        try:
            for backend in backends:
                backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
            yield
        finally:
            for backend, value in zip(backends, saved, strict=True):
                backend.fp32_precision = value


def parameter_dtype(precision: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype parameters and inputs are cast to: float64 products, else float32 at least."""
    if precision not in PRECISIONS:
        raise UsageError(f"nostalgia.precision={precision!r}: allowed are {', '.join(PRECISIONS)}")
    return torch.float64 if precision == "float64" else torch.promote_types(dtype, torch.float32)


def move(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``batch`` with its tensors on ``device`` and floating ones in ``dtype``; containers and dataclasses rebuilt."""
    if isinstance(batch, Tensor):
        return batch.to(device=device, dtype=dtype if batch.is_floating_point() else None)
    if isinstance(batch, dict):
        return type(batch)({key: move(value, device, dtype) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device, dtype) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move(value, device, dtype) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = {f.name: move(getattr(batch, f.name), device, dtype) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **values)
    return batch


class GraphMeter:
    """Counts the bytes that autograd saves while active, each storage once."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    @contextmanager
    def active(self) -> Iterator[GraphMeter]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield self


def free_bytes(device: torch.device) -> int:
    """Memory a process may still take on ``device``; on CPU shared with the other ranks of this machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import os

    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
