"""The rate of a phase: it rises for a fifth of it at most, and comes down again."""

from __future__ import annotations

import pytest
import torch

from nostalgia.training import loop


@pytest.mark.parametrize(("warmup", "epochs"), [(5, 5), (5, 1), (1, 10), (0, 3)])
def test_a_warm_up_of_any_length_leaves_the_rate_time_to_fall(warmup: float, epochs: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    options = loop.Optimization(epochs=epochs, lr=1.0, warmup_epochs=warmup, scheduler="cosine")
    schedule = loop.make_scheduler(optimizer, options, 10)
    rates = []
    for _ in range(10 * epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] > 0
    assert rates.index(max(rates)) <= loop.WARMUP_SHARE * len(rates)
    assert rates[-1] < 0.2 * max(rates)
