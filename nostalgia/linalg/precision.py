"""float32 matrix products in float32, whatever the process allows its training to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision_matmul(device_type: str = "cuda") -> Iterator[None]:
    """No TF32 or bfloat16 inside: not by the backends' flags (CUDA, oneDNN), not by autocast on the device.

    Reads and sets only torch's ``fp32_precision`` flags: their legacy spelling ``allow_tf32`` raises as
    soon as a process has used both.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    saved = [backend.fp32_precision for backend in backends]
    inherited = []
    for backend in backends:
        backend.fp32_precision = "none"
        inherited.append(backend.fp32_precision)
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        # A flag that only followed the global one is left following it.
        for backend, value, default in zip(backends, saved, inherited, strict=True):
            backend.fp32_precision = "none" if value == default else value
