"""Where tensors lie for a collective; `tests/distributed` moves them between ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nostalgia.parallel import tensors


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        ("cuda:nccl", "cpu", "cuda"),  # an optimizer's step, batch-norm statistics of finished tasks
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:gloo", "cuda:0", "cuda:0"),
    ],
)
def test_a_group_without_the_cpu_takes_tensors_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, config: str, device: str, expected: str
) -> None:
    monkeypatch.setattr(tensors, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    assert tensors.carrier(torch.device(device)) == torch.device(expected)


def test_one_process_moves_nothing() -> None:
    assert tensors.carrier(torch.device("cpu")) == torch.device("cpu")
