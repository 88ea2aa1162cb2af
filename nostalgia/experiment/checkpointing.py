"""When a run writes a checkpoint, and when it stops: at points that all ranks reach together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from nostalgia.checkpoint.store import TASK_END, CheckpointContents, CheckpointStore
from nostalgia.config.schema import Config
from nostalgia.errors import InterruptedRun, RunFailedError
from nostalgia.parallel.coordination import from_main
from nostalgia.parallel.stop import StopRequest

SHARE = 0.02  # of an eigensolve's time that its own checkpoints may take
CONSIDER = 10  # products between two looks at the clock: rank 0's word goes to all


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How often: 0 is never."""

    every_steps: int = 0
    every_epochs: int = 1
    every_products: int | None = 0  # None: as often as `SHARE` of the solve's time allows
    keep: int = 2
    on_failure: str = "stop"  # or continue, with a warning

    @classmethod
    def of(cls, config: Config) -> Schedule:
        train = config.train
        return cls(
            every_steps=train.checkpoint_every_steps,
            every_epochs=train.checkpoint_every_epochs,
            every_products=config.curvature.checkpoint_every_n_products,
            keep=train.keep_checkpoints,
            on_failure=train.on_checkpoint_failure,
        )


@dataclass
class _Solve:
    """An eigensolve under way: when it began, and the seconds its checkpoints took."""

    started: float
    products: int = 0
    spent: float = 0.0

    def affords(self, cost: float) -> bool:
        """Whether one more checkpoint of ``cost`` seconds stays within `SHARE` of the time since the start."""
        return self.spent + cost <= SHARE * (time.perf_counter() - self.started)


class Checkpointer:
    """Asks ``make(kind)`` for a checkpoint's contents, a collective, and has rank 0 write them."""

    def __init__(
        self,
        run_dir: Path,
        accelerator: Accelerator,
        schedule: Schedule,
        make: Callable[[str], CheckpointContents],
        warn: Callable[[str], None],
    ) -> None:
        self.accelerator, self.schedule, self.make, self.warn = accelerator, schedule, make, warn
        self.store = CheckpointStore(run_dir, schedule.keep) if accelerator.is_main_process else None
        self.stop = StopRequest(accelerator)
        self.seconds = 0.0  # that training has waited for checkpoints
        self._epochs = 0
        self._latest = 0.0  # seconds the latest checkpoint took
        self._solve: _Solve | None = None

    def after_step(self, taken: int, epoch_done: bool) -> None:
        """After an optimizer step, or after an epoch's validation."""
        every = self.schedule
        kind = ""
        if epoch_done:
            self._epochs += 1
            kind = "epoch" if every.every_epochs and self._epochs % every.every_epochs == 0 else ""
        elif every.every_steps and taken % every.every_steps == 0:
            kind = "step"
        self.pause_point(kind)

    def after_product(self, products: int) -> None:
        """Between two products of an eigensolve."""
        every = self.schedule.every_products
        if every is not None:
            self.pause_point("eigensolve" if every and products % every == 0 else "")
            return
        if self._solve is None or products <= self._solve.products:
            self._solve = _Solve(time.perf_counter())
        solve = self._solve
        solve.products = products
        due = products % CONSIDER == 0 and from_main(self.accelerator, solve.affords(self._latest))
        before = self.seconds
        self.pause_point("eigensolve" if due else "")
        solve.spent += self.seconds - before

    def task_ended(self) -> None:
        """A task has ended: its checkpoint is kept."""
        self.pause_point(TASK_END)

    def pause_point(self, kind: str = "") -> None:
        """A point where the run may stop; a checkpoint of ``kind`` is due here, if any is.

        Raises InterruptedRun, on all ranks, where one was asked to stop, with a checkpoint written.
        """
        name = self.stop.agreed()
        if name:
            self._write("stopped", background=False, required=True)
            # Rank 0 writes; a rank that ended before would take it along (`FailureWatch`).
            self.accelerator.wait_for_everyone()
            raise InterruptedRun(f"{name}: stopped with a checkpoint written; --resume goes on from there")
        if kind:
            self._write(kind, background=True)
        elif self.store is not None and self.store.failed:
            self._guarded(self.store.wait)

    def close(self) -> None:
        """Wait for what is being written."""
        if self.store is not None:
            self._guarded(self.store.wait)

    def _write(self, kind: str, *, background: bool, required: bool = False) -> None:
        started = time.perf_counter()
        self.close()  # the one before must be whole before this one's parts are made
        contents = self.make(kind)
        if self.store is not None:
            store = self.store
            self._guarded(lambda: store.write(contents, background=background), required)
        self._latest = time.perf_counter() - started
        self.seconds += self._latest

    def _guarded(self, work: Callable[[], None], required: bool = False) -> None:
        try:
            work()
        except OSError as error:
            where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            line = f"a checkpoint could not be written: {where}"
            if required or self.schedule.on_failure == "stop":
                whole = self.store is not None and self.store.written
                after = "--resume goes on from the last whole one" if whole else "begin anew: there is none yet"
                raise RunFailedError(
                    f"{line}; free space, then {after} (train.on_checkpoint_failure=continue trains on without)"
                ) from None
            self.warn(f"{line}; the run goes on")
