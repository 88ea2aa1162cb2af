"""Processes for tests, forked from a server that has imported the program: a start costs no imports.

They find the variables torchrun would set, and rank 0 holds the group's store. Tests of launching itself use
`tests.distributed.harness.launch_command`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

_SERVER = multiprocessing.get_context("forkserver")
_UNCAUGHT = 99  # exit code after an exception nobody caught
_SERVER.set_forkserver_preload(["tests.preload"])


class Finished(NamedTuple):
    codes: list[int]
    stdout: str
    stderr: str


class Ranks:
    """``main(*arguments)`` in ``world_size`` processes, what they print in ``folder``/stdout and stderr.

    ``main`` is a function of a module, its arguments can be pickled, and its result is the exit code (None: 0).
    """

    def __init__(
        self,
        main: Callable[..., int | None],
        *arguments: Any,
        world_size: int = 1,
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = folder
        # No card: FSDP2 would take one that it sees, whatever Accelerate is told.
        cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        variables = {**cpu, **(environment or {})}
        if world_size > 1:
            variables |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.processes = []
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            process = _SERVER.Process(target=_child, args=(main, arguments, variables | own, folder))
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 240) -> Finished:
        """Until all have ended; when one was killed or raised the others are killed, as a launcher would.

        Raises AssertionError when they have not ended after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while running := [p for p in self.processes if p.exitcode is None]:
            wait([p.sentinel for p in running], max(0.0, deadline - time.monotonic()))
            if any(p.exitcode in (-signal.SIGKILL, _UNCAUGHT) for p in self.processes):
                self.kill()
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {timeout:g} s: {self._output()}")
        return Finished([p.exitcode for p in self.processes], *self._output())

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def send(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def _output(self) -> tuple[str, str]:
        return (self._folder / "stdout").read_text(), (self._folder / "stderr").read_text()


def run(main: Callable[..., int | None], *arguments: Any, timeout: float = 240, **options: Any) -> Finished:
    """`Ranks` to their end; options as there, the folder a temporary one."""
    with tempfile.TemporaryDirectory() as folder:
        return Ranks(main, *arguments, folder=Path(folder), **options).wait(timeout)


def run_train(words: Sequence[str], world_size: int = 1, **options: Any) -> Finished:
    """``python -m nostalgia.train WORDS`` on ``world_size`` ranks."""
    return run(train, list(words), world_size=world_size, **options)


def train(words: list[str]) -> int:
    from nostalgia.train import main

    return main(words)


def run_ranks(
    case: Callable[..., Any], world_size: int, *, environment: Mapping[str, str] | None = None, **kwargs: Any
) -> list[Any]:
    """Call ``case(**kwargs)`` on every rank of a gloo group; returns each rank's JSON-able result, in rank order.

    Raises AssertionError with the ranks' output when any of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = run(_call, case, kwargs, Path(folder), world_size=world_size, environment=environment)
        if any(done.codes):
            raise AssertionError(f"{case.__name__} on {world_size} ranks: {done.codes}\n{done.stdout}\n{done.stderr}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]


def _call(case: Callable[..., Any], kwargs: dict[str, Any], folder: Path) -> None:
    import torch.distributed as dist

    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    dist.init_process_group("gloo")
    result = case(**kwargs)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()


def _child(
    main: Callable[..., int | None], arguments: Sequence[Any], variables: Mapping[str, str], folder: Path
) -> None:
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            with (folder / name).open("a") as file:
                os.dup2(file.fileno(), number)
        os.environ.update(variables)
        code = main(*arguments) or 0
    except BaseException:
        traceback.print_exc()
        code = _UNCAUGHT
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's end: gloo's threads now and then abort a process that tears them down.
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
