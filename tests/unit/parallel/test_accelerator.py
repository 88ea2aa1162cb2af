"""What the launcher's environment makes of a rank's device."""

from __future__ import annotations

import pytest
import torch

from nostalgia.errors import UsageError
from nostalgia.parallel.accelerator import LaunchInfo, make_accelerator


def test_fsdp_ranks_that_share_a_card_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="FSDP with 2 processes on 1 GPUs: needs a GPU for each"):
        make_accelerator(LaunchInfo(rank=0, world_size=2, device_type="cuda", fsdp=True), "32")
