"""``python -m nostalgia.figures RUN_DIR ...``: draws every figure a run folder allows, old, unfinished or broken off.

Of one run into RUN_DIR/results/figures, saying which figures could not be made and why; several finished runs side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nostalgia.errors import NotFoundError, UsageError
from nostalgia.utils.arguments import CommandParser, ended

if TYPE_CHECKING:
    from nostalgia.analysis.drawing import Drawn

EPILOG = """examples:
  python -m nostalgia.figures runs/demo/latest                          writes runs/demo/latest/results/figures/*.png
  python -m nostalgia.figures runs/demo/2* --out comparison             methods and seeds side by side

Exit codes: 0 done, 2 wrong usage or a folder that cannot be written, 3 no such run or log file, or nothing in it to draw.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    return ended(_main, arguments)


def _main(arguments: list[str]) -> None:
    parser = CommandParser(
        prog="nostalgia.figures",
        usage="python -m nostalgia.figures RUN_DIR [RUN_DIR ...] [--out FOLDER] [--figure MODULE:FUNCTION]",
        description="Draw every figure that run folders allow: of one run, or of several finished ones side by side.",
        epilog=EPILOG,
    )
    parser.run_folders()
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: RUN_DIR/results/figures, ./figures for several"
    )
    parser.own_figures()
    flags = parser.parse_args(arguments)
    if len(flags.runs) == 1:
        say(draw(flags.runs[0], flags.out, own=flags.figure))
    elif flags.figure:
        raise UsageError("--figure: a figure of your own is drawn of one run")
    else:
        from nostalgia.analysis.compare import draw_side_by_side

        say(draw_side_by_side(flags.runs, flags.out or Path("figures")))


def draw(
    run_dir: Path,
    out: Path | None = None,
    *,
    log_csv: Path | None = None,
    mem_csv: Path | None = None,
    own: Sequence[str] = (),
) -> Drawn:
    """Draw the run in ``run_dir`` into ``out``, by default its results/figures; ``own`` as in `draw_run`.

    Raises NotFoundError where there is no such folder or file, or nothing in it to draw; UsageError where the
    figures cannot be written.
    """
    from nostalgia.analysis.drawing import draw_run
    from nostalgia.analysis.run_folder import read_run

    for given in (log_csv, mem_csv):
        if given is not None and not given.is_file():
            raise NotFoundError(f"{given}: no such file")
    if not run_dir.is_dir():
        raise NotFoundError(f"{run_dir}: no such folder")
    run = read_run(run_dir.resolve(), log_csv=log_csv, mem_csv=mem_csv)
    folder = out or run.path / "results" / "figures"
    try:
        drawn = draw_run(run, folder, own)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from None
    if not drawn.made:
        raise NotFoundError(f"{run_dir}: nothing to draw; {'; '.join(run.problems.values())}")
    return drawn


def say(drawn: Drawn) -> None:
    """One line a figure: where it is, or why it was not made."""
    for name, path in drawn.made.items():
        print(f"{name:<25} {path}")
    for name, reason in drawn.skipped.items():
        print(f"{name:<25} not made: {reason}")


if __name__ == "__main__":
    sys.exit(main())
