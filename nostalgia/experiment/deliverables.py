"""What a finished run leaves: results, figures, the exported model and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nostalgia.analysis.drawing import draw_run
from nostalgia.analysis.report import write_report
from nostalgia.analysis.run_folder import read_run
from nostalgia.experiment.components import Components
from nostalgia.experiment.exporting import EXPORT, export_run
from nostalgia.logging.console import print_final
from nostalgia.logging.results import RunResults, write_results
from nostalgia.logging.run_log import RunLog


def write_deliverables(
    folder: Path, run: Components, results: RunResults, command: Sequence[str], console: Console, log: RunLog
) -> None:
    """Write them into the run's ``folder`` and show the results; on rank 0."""
    paths = write_results(folder / "results", results)
    if run.config.experiment.export:
        paths[EXPORT] = export_run(folder, run, results, command)
    skipped: tuple[str, ...] = ()
    if run.config.logger.report:
        own = run.config.logger.figures
        drawn = draw_run(read_run(folder), folder / "results" / "figures", own)
        log.figures(drawn.made)
        skipped = tuple(drawn.skipped)
        paths |= {"figures": folder / "results" / "figures", "report": write_report([folder], own_figures=own)}
    print_final(console, results, paths)
    if skipped:  # `nostalgia.figures` says why of each
        console.print(f"nothing to draw for  {', '.join(skipped)}", highlight=False)
