"""What each rank does in the tests of this package that need several."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from nostalgia.models import norm_statistics


def check_average_over_ranks() -> bool:
    """Statistics of two ranks' shares, averaged, are those of one process that saw both as one batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(world, 512, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 5.0])
    rows += torch.arange(world).view(-1, 1, 1) * 3.0  # shares whose means differ: the variances' mean is not enough

    def layers() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(3, momentum=1.0), nn.Linear(3, 3), nn.BatchNorm1d(3)).double()

    network = layers()
    network[0](rows[rank])
    norm_statistics.average_over_ranks(network)
    expected = rows.flatten(0, 1)
    assert torch.allclose(network[0].running_mean, expected.mean(0), rtol=0, atol=1e-12)
    # Each rank's unbiased variance carries 512/511, one process's 1024/1023.
    assert torch.allclose(network[0].running_var, expected.var(0), rtol=2e-3)
    biased = rows.var(1, correction=1).mean(0) + rows.mean(1).var(0, correction=0)
    assert torch.allclose(network[0].running_var, biased, rtol=1e-12)
    gathered = [torch.empty_like(network[0].running_var) for _ in range(world)]
    dist.all_gather(gathered, network[0].running_var)
    return bool(torch.equal(gathered[0], gathered[1]))
