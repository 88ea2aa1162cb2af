"""The progress display: one on a terminal, few lines elsewhere, none on other ranks; no output ends a run."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from nostalgia.logging.progress import Progress, duration
from nostalgia.logging.streams import ForgivingStream, make_console


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def one_task(progress: Progress, clock: Clock, seconds_per_step: float = 1.0) -> None:
    with progress, progress.task(2, "task2_digits"):
        progress.phase(2, 10)
        for epoch in (1, 2):
            for _ in range(10):
                clock.now += seconds_per_step
                progress.step(0.5, 1234.0)
            progress.epoch(epoch, loss=0.25, accuracy=0.9, leak=1e-7)
        with progress.eigensolve(8) as solve:
            for products in (4, 8, 12):
                clock.now += seconds_per_step
                solve.products(products, products // 2)


def test_plain_lines_are_few_and_say_where_the_run_is() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(total_tasks=3, console=make_console(stream=stream), interval=5.0, clock=clock)
    one_task(progress, clock)
    assert stream.getvalue().splitlines() == [
        "task 2/3 task2_digits  train epoch 1/2 step 5/20  loss 0.5000  1,234 images/s  15 s left",
        "task 2/3 task2_digits  train epoch 1/2 step 10/20  loss 0.5000  1,234 images/s  10 s left",
        "task 2/3 task2_digits  train epoch 1/2 done  val accuracy 0.900  val loss 0.2500  leak 1.0e-07  10 s left",
        "task 2/3 task2_digits  train epoch 2/2 step 15/20  loss 0.5000  1,234 images/s  5 s left",
        "task 2/3 task2_digits  train epoch 2/2 step 20/20  loss 0.5000  1,234 images/s",
        "task 2/3 task2_digits  train epoch 2/2 done  val accuracy 0.900  val loss 0.2500  leak 1.0e-07",
        "task 2/3 task2_digits  eigenpairs: 6/8 converged, 12 products in 3.0 s",
    ]


def test_a_long_eigensolve_reports_in_between() -> None:
    stream, clock = io.StringIO(), Clock()
    one_task(Progress(total_tasks=3, console=make_console(stream=stream), clock=clock), clock, seconds_per_step=6.0)
    assert "task 2/3 task2_digits  eigenpairs: 4/8 converged, 8 products" in stream.getvalue().splitlines()


def test_a_terminal_gets_one_display_with_all_of_it() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with Progress(total_tasks=3, console=console) as progress, progress.task(1, "task1_digits"):
        progress.phase(2, 10, label="warm-up")
        progress.step(0.5, 1234.0)
        progress._live.refresh()  # type: ignore[union-attr]
        console.print("a line above")
        with progress.eigensolve(8) as solve:
            solve.products(12, 5, limit=200)
            progress._live.refresh()  # type: ignore[union-attr]
    shown = stream.getvalue()
    for text in (
        "task1_digits",
        "0/3",
        "warm-up",
        "1/20",
        "epoch 1/2  loss 0.5000  1,234 images/s",
        "a line above",
    ):
        assert text in shown
    assert "5/8" in shown
    assert "12 products of at most 200" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_other_ranks_are_silent(terminal: bool) -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=terminal, quiet=True)
    one_task(Progress(False, 3, console=console, clock=clock), clock, seconds_per_step=100.0)
    assert stream.getvalue() == ""


def test_the_display_ends_with_the_error_that_ends_the_run() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    progress = Progress(console=console)

    def failing() -> None:
        with progress, progress.task(1, "a"):
            progress.phase(1, 1)
            raise KeyError("x")

    with pytest.raises(KeyError):
        failing()
    assert progress._live is not None
    assert not progress._live.live.is_started


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error"), ValueError("closed file")])
def test_a_stream_that_fails_is_written_to_no_more(error: Exception) -> None:
    class Failing(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise error

    inner, clock = Failing(), Clock()
    stream = ForgivingStream(inner)
    console = Console(file=stream)  # type: ignore[arg-type]
    one_task(Progress(console=console, clock=clock), clock, seconds_per_step=9.0)
    assert inner.writes == 1


SPEAKER = """
import sys
from nostalgia.logging.progress import Progress
with Progress(total_tasks=1, interval=0.0) as progress, progress.task(1, "a"):
    progress.phase(1, 20000)
    for _ in range(20000):
        progress.step(0.5, 1.0)
sys.stderr.write("finished")
"""


@pytest.mark.parametrize("reader", ["head -n 1", "true"])
def test_a_run_outlives_the_reader_of_its_output(reader: str) -> None:
    command = f"{sys.executable} -c '{SPEAKER}' | {reader}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == "finished"
    assert done.stdout.splitlines()[-1] == "0"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7650, "2 h 07 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
