"""Measures the seconds that a method adds to training steps, beside the work that plain fine-tuning does as well."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

T = TypeVar("T")
SAMPLED_ON_GPU = 20  # a GPU must be waited for at each reading: every so many steps, scaled up


class OverheadClock:
    """Adds up what a method's hooks cost in steps.

    ``loss``: its seconds outside the trained model, and the share of forward and backward passes that rows beyond the
    batch's own take (replay). ``gradients`` counts whole; ``step`` without the optimizer's own step.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0
        self._every = SAMPLED_ON_GPU if device.type == "cuda" else 1
        self._measuring, self._forward, self._rows, self._inner, self._began = True, 0.0, 0, 0.0, 0.0
        self._handles = [
            model.register_forward_pre_hook(self._forward_begins),
            model.register_forward_hook(self._forward_ends),
            optimizer.register_step_pre_hook(self._step_begins),
            optimizer.register_step_post_hook(self._step_ends),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def of_step(self, number: int) -> Iterator[None]:
        """One optimizer step, ``number`` from 1."""
        self._measuring = number % self._every == 0 or self._every == 1
        yield
        self._measuring = False

    def passes(self, rows: int, forward: Callable[[], T], backward: Callable[[T], None]) -> T:
        """Run a micro-batch of ``rows``: its loss by ``forward``, then ``backward`` of what that gave."""
        if not self._measuring:
            result = forward()
            backward(result)
            return result
        self._forward, self._rows = 0.0, 0
        started = self._now()
        result = forward()
        between = self._now()
        backward(result)
        passes = self._forward + self._now() - between
        extra = max(0.0, between - started - self._forward)
        self._add(extra + passes * max(0, self._rows - rows) / max(1, self._rows))
        return result

    def hook(self, work: Callable[[], None]) -> None:
        """Run ``work``; the optimizer's own step within it does not count."""
        if not self._measuring:
            work()
            return
        self._inner = 0.0
        started = self._now()
        work()
        self._add(self._now() - started - self._inner)

    def _add(self, seconds: float) -> None:
        self.seconds += self._every * seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _forward_begins(self, module: nn.Module, arguments: Any) -> None:
        if self._measuring:
            self._rows += len(arguments[0]) if arguments else 0
            self._began = self._now()

    def _forward_ends(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._measuring:
            self._forward += self._now() - self._began

    def _step_begins(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        if self._measuring:
            self._began = self._now()

    def _step_ends(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        if self._measuring:
            self._inner += self._now() - self._began
