"""What the launcher's environment makes of a rank's device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nostalgia.errors import UsageError
from nostalgia.parallel.accelerator import LaunchInfo, make_accelerator, ranks_note


def test_fsdp_ranks_that_share_a_card_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="FSDP with 2 processes on 1 GPUs: needs a GPU for each"):
        make_accelerator(LaunchInfo(rank=0, world_size=2, device_type="cuda", fsdp=True), "32")


def test_fsdp_on_the_cpu_beside_a_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 would put its shards on the card, whatever Accelerate is told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        UsageError, match=r"FSDP with train\.accelerator=cpu where a GPU is visible: .*CUDA_VISIBLE_DEVICES="
    ):
        make_accelerator(LaunchInfo(rank=0, world_size=2, device_type="cpu", fsdp=True), "32")


@pytest.mark.parametrize(
    ("device", "ranks", "backend", "said"),
    [("cuda", 2, "gloo", True), ("cuda", 2, "nccl", False), ("cuda", 1, "gloo", False), ("cpu", 2, "gloo", False)],
)
def test_gpus_that_talk_by_gloo_are_noted(
    monkeypatch: pytest.MonkeyPatch, device: str, ranks: int, backend: str, said: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=ranks)
    assert ("they talk by gloo" in ranks_note(accelerator)) is said
