"""Starts a sweep's runs, some at a time, and shows where each is on one display."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from nostalgia.errors import NotFoundError
from nostalgia.logging.progress import duration
from nostalgia.logging.results import read_results

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str  # "nostalgia seed 0"
    folder: Path  # the run's
    words: tuple[str, ...]  # for nostalgia.train
    complete: bool = False

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")


@dataclass(frozen=True)
class Outcome:
    job: Job
    code: int  # the run's exit code
    seconds: float

    def line(self) -> str:
        """What became of the run, in one line."""
        if self.code == 0:
            return f"{self.job.name}: done in {duration(self.seconds)}, accuracy {_accuracy(self.job.folder)}"
        if self.code == 75:
            return f"{self.job.name}: interrupted, it will go on from its checkpoint"
        return f"{self.job.name} failed with exit code {self.code}: {_reason(self.job.log)} ({self.job.log})"


class Started(Protocol):
    """A run under way."""

    def wait(self) -> int:
        """Its exit code, once it has ended."""

    def send_signal(self, number: int, /) -> None: ...


Start = Callable[[Job, Mapping[str, str]], Started]  # of a job, with what is added to its environment


def run_command(job: Job) -> list[str]:
    """The command of a run; its folder is in the environment's RUN_DIR."""
    return ["bash", str(launch_folder() / "ddp.sh"), *job.words]


def run_environment(run_dir: Path | str, added: Mapping[str, str]) -> dict[str, str]:
    """The environment of a run: this process's, in which `python` is this interpreter even where nothing activated it."""
    path, own = os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)
    if own not in path.split(os.pathsep):
        path = os.pathsep.join([own, path])
    return {**os.environ, "PATH": path, **added, "RUN_DIR": str(run_dir)}


def start_here(job: Job, environment: Mapping[str, str]) -> Started:
    """Start the run as a process of this machine, its output in the job's log."""
    with job.log.open("ab") as log:
        # A session of its own: the terminal's Ctrl-C comes to us, and from us to the runs.
        return subprocess.Popen(
            run_command(job),
            env=run_environment(job.folder, environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Sweep:
    """The runs under way; a signal ends them with a checkpoint and starts no further one."""

    def __init__(self, parallel: int, start: Start = start_here, budget_minutes: float | None = None) -> None:
        self._start = start
        self._deadline = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
        self._slots: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
        for slot in gpu_slots(parallel, os.environ) if start is start_here else [{}] * parallel:
            self._slots.put(slot)
        self._running: dict[str, tuple[Job, Started]] = {}
        self._lock = threading.Lock()
        self.stopping = False

    def run(self, job: Job) -> Outcome:
        """Run ``job`` in the next free slot; waits for its end."""
        started = time.monotonic()
        slot = self._slots.get()
        try:
            code = self._run(job, slot)
            return Outcome(job, 75 if self._interrupted(code) else code, time.monotonic() - started)
        finally:
            self._slots.put(slot)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handler of the signals; the main thread never holds the lock when one comes."""
        with self._lock:
            self.stopping = True
            for _, process in self._running.values():
                process.send_signal(signal.SIGTERM)

    def places(self) -> list[str]:
        """Where each run under way is, one line each."""
        with self._lock:
            jobs = [job for job, _ in self._running.values()]
        return [f"{job.name}: {_place(job.log)}" for job in jobs]

    def _run(self, job: Job, slot: Mapping[str, str]) -> int:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            late = self._deadline is not None and time.monotonic() > self._deadline
            if self.stopping or late:
                return 75
            run = self._start(job, slot)
            self._running[job.name] = job, run
        code = run.wait()
        with self._lock:
            del self._running[job.name]
        return code

    def _interrupted(self, code: int) -> bool:
        """Whether this sweep has ended the run: one that has yet to load its data and weights does not listen for signals.

        torchrun then ends with 1, which is no code of a run's own.
        """
        return self.stopping and code in (-signal.SIGTERM, 128 + signal.SIGTERM, 1)


def run_jobs(
    jobs: Sequence[Job],
    parallel: int,
    console: Console,
    budget_minutes: float | None = None,
    start: Start = start_here,
) -> dict[str, Outcome]:
    """Run ``jobs``, ``parallel`` at a time, whatever becomes of each; their outcomes by name.

    After ``budget_minutes`` no further one is started: what is left counts as interrupted.
    """
    sweep, outcomes = Sweep(parallel, start, budget_minutes), {}
    with _signals_to(sweep), _display(console, len(jobs)) as show, ThreadPoolExecutor(parallel) as pool:
        waiting = {pool.submit(sweep.run, job) for job in jobs}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for outcome in (future.result() for future in done):
                outcomes[outcome.job.name] = outcome
                if outcome.code != 75:
                    console.print(outcome.line(), highlight=False, markup=False, soft_wrap=True)
            show(len(outcomes), sweep.places())
    return outcomes


def gpu_slots(parallel: int, environment: Mapping[str, str], gpus: Sequence[str] | None = None) -> list[dict[str, str]]:
    """What each of ``parallel`` places adds to a run's environment: its share of the GPUs, where there are enough.

    ``gpus``: their names for CUDA_VISIBLE_DEVICES; found out where not given.
    """
    if parallel == 1:
        return [{}]
    if gpus is None:
        from torch import cuda  # seconds to import

        visible = environment.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(index) for index in range(cuda.device_count())]
    share = len(gpus) // parallel
    if not share:
        return [{} for _ in range(parallel)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])} for i in range(parallel)]


def launch_folder() -> Path:
    """``launch/``: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "launch", package.parent / "launch"):
        if (folder / "ddp.sh").is_file():
            return folder
    raise NotFoundError(f"no launch/ddp.sh in {package} or beside it: the installation is incomplete")


@contextmanager
def _signals_to(sweep: Sweep) -> Iterator[None]:
    before = {number: signal.signal(number, sweep.stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _display(console: Console, total: int) -> Iterator[Callable[[int, list[str]], None]]:
    """A function that shows how many runs are done and where the others are: live, or a line for each that starts."""
    started: set[str] = set()

    def lines(done: int, places: list[str]) -> None:
        for name in (place.partition(": ")[0] for place in places):
            if name not in started:
                started.add(name)
                console.print(f"{name}: started", highlight=False, markup=False)

    if not console.is_terminal:
        yield lines
        return
    bar = ProgressBar(total=max(total, 1), width=16)
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def show(done: int, places: list[str]) -> None:
            bar.update(done)
            heading = Columns([Text("runs"), bar, Text(f"{done}/{total}")])
            live.update(Group(heading, *(Text(place, no_wrap=True, overflow="ellipsis") for place in places)))

        yield show


def _place(log: Path) -> str:
    """The newest line of a run's output that tells where it is."""
    lines = [line for line in _tail(log) if line.startswith("task ")]
    return lines[-1] if lines else "starting"


def _reason(log: Path) -> str:
    """Its error's line, else the last that it printed: that of a traceback, or of a shell."""
    lines = [line for line in _tail(log) if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no reason given"])[-1]


def _tail(log: Path, size: int = 20_000) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _accuracy(folder: Path) -> str:
    acc = read_results(folder / "results").acc
    return "not measured" if acc is None else f"{acc:.3f}"
