"""Clocks of a training step: of whole windows, and of its parts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


class Clock:
    """Milliseconds since `start`: processor time, or events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.began: Any = None

    def now(self) -> Any:
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.began = self.now()

    def stop(self) -> float:
        ended = self.now()
        if self.cuda:
            ended.synchronize()
            return float(self.began.elapsed_time(ended))
        return 1e3 * float(ended - self.began)


@dataclass
class PartTimes:
    """Milliseconds spent in each part of a step, counted while ``open``; a GPU is waited for around each."""

    device: torch.device
    open: bool = False
    milliseconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        if not self.open:
            yield
            return
        began = self._now()
        yield
        self.milliseconds[part] += 1e3 * (self._now() - began)

    def around(self, owner: Any, name: str, part: str) -> None:
        """Put the clock of ``part`` around ``owner.name``."""
        inner = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.of(part):
                return inner(*arguments, **keywords)

        setattr(owner, name, timed)

    def around_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the clock of ``optimizer`` around its own step, by hooks: schedulers mind a step that is replaced."""
        running: list[Any] = []

        def begin(*_: Any) -> None:
            running.append(self.of("optimizer"))
            running[-1].__enter__()

        def end(*_: Any) -> None:
            running.pop().__exit__(None, None, None)

        optimizer.register_step_pre_hook(begin)
        optimizer.register_step_post_hook(end)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()
