"""``accelerate launch -m nostalgia.train``: parse, compose, run; one line and an exit code for what goes wrong."""

from __future__ import annotations

import os
import sys
import traceback
import warnings

from nostalgia.errors import NostalgiaError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 wrong usage or configuration, 3 data or weights not found, 4 run failed."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    from nostalgia.config import parse
    from nostalgia.config.checks import check_launch
    from nostalgia.parallel.accelerator import launch_info, make_accelerator
    from nostalgia.parallel.failure import FailureWatch, leave

    watch: FailureWatch | None = None
    try:
        request = parse(sys.argv[1:] if argv is None else argv)
        launch = launch_info(request.config.train.accelerator)
        precision = check_launch(request.config, device_type=launch.device_type, world_size=launch.world_size)
        accelerator = make_accelerator(launch, precision, request.config.train.timeout_minutes)
        watch = FailureWatch()
        from nostalgia.experiment import run

        run(request, accelerator, precision)
        watch.stop()
        accelerator.end_training()
        return 0
    except NostalgiaError as error:
        _stop(watch, error.exit_code, f"error: {error}")
        leave(error.exit_code)
    except KeyboardInterrupt:
        _stop(watch, 130, "interrupted")
        leave(130)
    except Exception as error:  # a bug, or the echo of another rank's failure
        other = watch.other() if watch is not None else None
        if other is not None:
            leave(other.exit_code)
        traceback.print_exc()
        _stop(watch, 1, f"error: {type(error).__name__}: {error}")
        leave(1)
    return 1


def _stop(watch: object, exit_code: int, line: str) -> None:
    """Print ``line`` once for the whole run: by the first rank that failed, or rank 0 before ranks know each other."""
    from nostalgia.parallel.failure import FailureWatch

    if isinstance(watch, FailureWatch):
        first = watch.announce(exit_code, line)
    else:
        first = os.environ.get("RANK", "0") == "0"
    if first:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
