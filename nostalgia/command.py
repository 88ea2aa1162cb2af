"""A command that ranks run together, from its line to its exit code: parse, start, run; one line for what goes wrong."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nostalgia.errors import NostalgiaError, RunFailedError
from nostalgia.utils.exit_code import already_ended, leave, leave_on_interrupt

if TYPE_CHECKING:
    from accelerate import Accelerator

    from nostalgia.parallel.failure import FailureWatch


def run_command(
    argv: list[str] | None, parse: Callable[[list[str]], Any], run: Callable[[Any, Accelerator, str], Any]
) -> int:
    """``parse`` makes of ``argv`` (None: the program's own) a request with ``config``, which ``run`` does, given the precision.

    Exit codes: 0 done, 1 a bug, 2 wrong usage or configuration, 3 data or weights not found, 4 run failed, 75 interrupted, 130
    interrupted before there was anything to keep.
    """
    if already_ended():
        return 0
    watch: FailureWatch | None = None
    if argv is None:
        leave_on_interrupt(lambda: _stop(watch, 130, "interrupted"))
    warnings.filterwarnings("ignore", category=FutureWarning)
    from nostalgia.config.checks import check_launch

    try:
        request = parse(sys.argv[1:] if argv is None else argv)
        # Seconds to import: a refused command line, and --help, need not wait for them.
        from nostalgia.parallel.accelerator import launch_info, make_accelerator
        from nostalgia.parallel.failure import FailureWatch

        launch = launch_info(request.config.train.accelerator)
        precision = check_launch(request.config, device_type=launch.device_type, world_size=launch.world_size)
        accelerator = make_accelerator(launch, precision, request.config.train.timeout_minutes)
        watch = FailureWatch(request.config.train.heartbeat_seconds)
        try:
            run(request, accelerator, precision)
        except SystemExit as error:  # of code of the user's own: without this it would pass for a run's end
            from nostalgia.utils.tracebacks import last_frame

            raise RunFailedError(f"exit was called at {last_frame(error)}") from error
        watch.stop()
        accelerator.end_training()
        return 0
    except NostalgiaError as error:
        _stop(watch, error.exit_code, f"error: {error}")
        leave(error.exit_code)
    except Exception as error:
        _stop_on(error, watch)
    return 1


def _stop_on(error: Exception, watch: FailureWatch | None) -> None:
    """End with the line and the exit code of an error that is none of `nostalgia.errors`."""
    from nostalgia.utils.tracebacks import own_frame

    other = watch.other() if watch is not None and not isinstance(error, OSError) else None
    if other is not None:  # the echo of another rank's failure
        leave(other.exit_code, stuck=other.stuck)
    own = own_frame(error)
    if isinstance(error, OSError) and not own:  # of the run's own files: data and weights come as NotFoundError
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _stop(watch, 4, f"error: the run's files cannot be written: {where}; free space or name another folder")
        leave(4)
    traceback.print_exc()
    if own:
        shards = "DTensor" in str(error)  # torch's own line says nothing of what to do
        hint = (
            "; under FSDP2 parameters are shards while a task is trained: docs/methods.md, Your own" if shards else ""
        )
        _stop(watch, 4, f"error: your own code failed at {own}{hint}")
        leave(4)
    _stop(watch, 1, f"error: {type(error).__name__}: {error}")
    leave(1)


def _stop(watch: FailureWatch | None, exit_code: int, line: str) -> None:
    """Print ``line`` once for the whole run: by the first rank that failed, or rank 0 before ranks know each other."""
    if watch.announce(exit_code, line) if watch is not None else os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    if watch is not None:
        watch.let_others_hear()
