"""The checksum that ranks are compared by."""

from __future__ import annotations

import pytest
import torch

from nostalgia.parallel import guard


def test_a_checksum_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    bits = tensor.view(torch.int32).long()
    whole = (bits * torch.arange(1, 1002)).sum()
    for piece in (7, 500, 1001, 2**24):
        monkeypatch.setattr(guard, "PIECE", piece)
        assert torch.equal(guard.checksum(tensor), whole)
    swapped = tensor[torch.tensor([1, 0, *range(2, 1001)])]
    assert not torch.equal(guard.checksum(swapped), whole)
