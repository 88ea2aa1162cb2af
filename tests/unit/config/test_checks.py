"""What the checks of a configuration make of it."""

from __future__ import annotations

import pytest
import torch

from nostalgia.config.checks import automatic_precision


@pytest.mark.parametrize(
    ("device", "has_bf16", "precision"), [("cpu", True, "32"), ("cuda", True, "bf16"), ("cuda", False, "16")]
)
def test_auto_precision_is_bf16_where_a_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, device: str, has_bf16: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert automatic_precision(device) == precision
