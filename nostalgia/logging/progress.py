"""Where the run is: one live display on a terminal, plain lines elsewhere, silence on other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.progress import Task as Bar
from rich.text import Text

from nostalgia.logging.streams import make_console


@dataclass
class _Place:
    """Where the run is, as both forms of display tell it."""

    task: int = 0
    name: str = ""
    label: str = ""
    epoch: int = 0
    epochs: int = 0
    steps_per_epoch: int = 0
    step: int = 0
    first: int = 0  # steps taken before ``started``, by a former part of the run
    started: float = 0.0

    @property
    def total(self) -> int:
        return self.epochs * self.steps_per_epoch

    def seconds_left(self, now: float) -> float | None:
        taken = self.step - self.first
        return (now - self.started) / taken * (self.total - self.step) if taken else None


class Eigensolve:
    """The display of one eigensolve; `products` fits the solver's progress numbers."""

    def __init__(self, show: Callable[[int, int, int | None], None]) -> None:
        self._show = show

    def products(self, done: int, converged: int, limit: int | None = None) -> None:
        """``done`` products so far (of at most ``limit``), ``converged`` pairs within the tolerance."""
        self._show(done, converged, limit)


class Progress:
    """Shows tasks, epochs, steps and eigensolves; a context manager, quiet where not ``enabled``.

    On a terminal: one rich display whose bars stay below what is printed. Otherwise: lines, at most one every
    ``interval`` seconds within an epoch, and one at its end. Never raises because of the output.
    """

    def __init__(
        self,
        enabled: bool = True,
        total_tasks: int = 1,
        *,
        console: Console | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console if console is not None else make_console(quiet=not enabled)
        self.total_tasks = total_tasks
        self._live = _bars(self.console) if enabled and self.console.is_terminal else None
        self._lines = enabled and not self.console.is_terminal
        self._interval, self._clock, self._spoke = interval, clock, clock()
        self._place = _Place()
        self._tasks_bar: TaskID | None = None
        self._phase_bar: TaskID | None = None

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
            self._tasks_bar = self._live.add_task("tasks", total=self.total_tasks, tail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def task(self, index: int, name: str) -> Iterator[None]:
        """All of one task's work; ``index`` counts from 1."""
        self._place = _Place(task=index, name=name)
        if self._live is not None and self._tasks_bar is not None:
            self._live.update(self._tasks_bar, completed=index - 1, tail=name)
        try:
            yield
        finally:
            self._drop_phase_bar()
        if self._live is not None and self._tasks_bar is not None:
            self._live.update(self._tasks_bar, completed=index)

    def phase(self, epochs: int, steps_per_epoch: int, label: str = "train", taken: int = 0) -> None:
        """Training of ``epochs`` x ``steps_per_epoch`` optimizer steps starts, or goes on after ``taken`` of them.

        ``label``: train, warm-up.
        """
        place = self._place
        place.epochs, place.steps_per_epoch, place.label = epochs, steps_per_epoch, label
        place.epoch, place.step, place.first, place.started = 1, taken, taken, self._clock()
        self._drop_phase_bar()
        if self._live is not None:
            self._phase_bar = self._live.add_task(label, total=max(place.total, 1), completed=taken, tail="")

    def step(self, loss: float | None = None, images_per_s: float | None = None) -> None:
        """One optimizer step was taken; the numbers where they were measured."""
        place = self._place
        place.step += 1
        place.epoch = (place.step - 1) // max(place.steps_per_epoch, 1) + 1
        if self._live is not None and self._phase_bar is not None:
            text = _numbers(loss=loss, images_per_s=images_per_s)
            named: dict[str, Any] = {"tail": f"epoch {place.epoch}/{place.epochs}  {text}"} if text else {}
            self._live.update(self._phase_bar, completed=place.step, **named)
        elif self._lines and loss is not None:
            self._say(lambda: f"{self._where()}  {_numbers(loss=loss, images_per_s=images_per_s)}{self._eta()}")

    def epoch(
        self,
        epoch: int,
        *,
        loss: float | None = None,
        accuracy: float | None = None,
        leak: float | None = None,
    ) -> None:
        """An epoch has ended; ``loss`` and ``accuracy`` on the validation split."""
        text = _numbers(val_loss=loss, val_accuracy=accuracy, leak=leak)
        place = self._place
        if self._live is not None and self._phase_bar is not None:
            self._live.update(self._phase_bar, tail=f"epoch {epoch}/{place.epochs}  {text}")
        elif self._lines:
            heading = f"{self._head()}  {place.label} epoch {epoch}/{place.epochs} done"
            self._say(lambda: f"{heading}  {text}".rstrip() + self._eta(), always=True)

    @contextmanager
    def eigensolve(self, wanted: int, label: str = "eigenpairs") -> Iterator[Eigensolve]:
        """The computation of ``wanted`` eigenpairs, or of as many other things, by name of ``label``."""
        pairs = label == "eigenpairs"
        bar = None
        if self._live is not None:
            self._drop_phase_bar()
            bar = self._live.add_task(label, total=wanted, tail="0 products" if pairs else "")
        started = self._clock()
        last = [0, 0]

        def show(done: int, converged: int, limit: int | None) -> None:
            last[:] = done, converged
            if self._live is not None and bar is not None:
                most = f" of at most {limit}" if limit else ""
                self._live.update(bar, completed=min(converged, wanted), tail=f"{done} products{most}" if pairs else "")
            elif self._lines:
                state = f" converged, {done} products" if pairs else ""
                self._say(lambda: f"{self._head()}  {label}: {converged}/{wanted}{state}")

        try:
            yield Eigensolve(show)
        finally:
            if self._live is not None and bar is not None:
                self._live.remove_task(bar)
        seconds = self._clock() - started
        if self._lines:
            state = f"{last[1]}/{wanted} converged, {last[0]} products" if pairs else f"{wanted}"
            self._say(lambda: f"{self._head()}  {label}: {state} in {seconds:.1f} s", always=True)

    def _head(self) -> str:
        return f"task {self._place.task}/{self.total_tasks} {self._place.name}"

    def _where(self) -> str:
        place = self._place
        epoch, step = f"{place.epoch}/{place.epochs}", f"{place.step}/{place.total}"
        return f"{self._head()}  {place.label} epoch {epoch} step {step}"

    def _eta(self) -> str:
        left = self._place.seconds_left(self._clock())
        return f"  {duration(left)} left" if left is not None and left >= 1 else ""

    def _say(self, line: Callable[[], str], always: bool = False) -> None:
        now = self._clock()
        if always or now - self._spoke >= self._interval:
            self._spoke = now
            self.console.print(line(), highlight=False, markup=False, soft_wrap=True)

    def _drop_phase_bar(self) -> None:
        if self._live is not None and self._phase_bar is not None:
            self._live.remove_task(self._phase_bar)
        self._phase_bar = None


class _Counts(ProgressColumn):
    """Completed of total, without the padding that the library's own column has."""

    def render(self, task: Bar) -> Text:
        return Text(f"{int(task.completed)}/{int(task.total or 0)}", style="progress.download")


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _bars(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=16),
        _Counts(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[tail]}", markup=False),
        console=console,
        refresh_per_second=4,
        transient=True,
    )


def _numbers(
    *,
    loss: float | None = None,
    images_per_s: float | None = None,
    val_loss: float | None = None,
    val_accuracy: float | None = None,
    leak: float | None = None,
) -> str:
    texts = (
        "" if loss is None else f"loss {loss:.4f}",
        "" if images_per_s is None else f"{images_per_s:,.0f} images/s",
        "" if val_accuracy is None else f"val accuracy {val_accuracy:.3f}",
        "" if val_loss is None else f"val loss {val_loss:.4f}",
        "" if leak is None else f"leak {leak:.1e}",
    )
    return "  ".join(text for text in texts if text)
