"""A request to stop from outside (SIGTERM, SIGUSR1, SIGINT), agreed on by all ranks at the same point of the run."""

from __future__ import annotations

import signal
from types import FrameType

import torch
from accelerate import Accelerator

from nostalgia.utils.exit_code import leave

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers a signal until all ranks can act on it together; a second SIGINT ends this process at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._signal = 0
        self._flag = torch.zeros(1, dtype=torch.int32, device=accelerator.device)

    def listen(self) -> None:
        """Take over the signals; only the main thread of a process can."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def agreed(self) -> str:
        """The name of a signal that any rank has received, else ''; a collective of one number."""
        number = self._signal
        if self._accelerator.num_processes > 1:
            # Not Accelerate's reduce: the tensor is made once, and one number is all that travels.
            torch.distributed.all_reduce(self._flag.fill_(number), op=torch.distributed.ReduceOp.MAX)
            number = int(self._flag)
        return signal.Signals(number).name if number else ""

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            leave(130, at_once=True)
        self._signal = number
