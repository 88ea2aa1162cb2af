"""Reads run folders and writes their page: HTML that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from nostalgia import __version__
from nostalgia.analysis.report.blocks import Page
from nostalgia.analysis.report.several import comparison_page
from nostalgia.analysis.report.single import run_page
from nostalgia.analysis.run_folder import RunFolder, read_run
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.utils.files import write_atomic

NAME = "report.html"


def write_report(
    folders: Sequence[Path],
    out: Path | None = None,
    select_seeds: Sequence[int] = (),
    own_figures: Sequence[str] = (),
) -> Path:
    """Write the report of the runs in ``folders``; returns its path.

    ``select_seeds``: those that strengths were chosen on, where methods were run at several. ``out`` defaults to
    results/report.html of a single run, and to report.html in the working folder for several. ``own_figures``: functions
    of the user's as ``module:function``, for the report of a single run.
    Raises NotFoundError for a folder that is not there or holds nothing of a run, UsageError where ``out`` cannot be
    written, and for figures that are not as they should be.
    """
    runs = [_read(folder) for folder in _distinct(folders)]
    if own_figures and len(runs) > 1:
        raise UsageError(f"--figure {own_figures[0]}: it is drawn of one run; name one RUN_DIR, not {len(runs)}")
    page = run_page(runs[0], own_figures) if len(runs) == 1 else comparison_page(runs, select_seeds)
    target = out or (runs[0].path / "results" / NAME if len(runs) == 1 else Path(NAME))
    try:
        write_atomic(target, render(page))
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror or error}); name a file by --out") from None
    return target


def render(page: Page) -> str:
    """The page as HTML; every text in it is escaped."""
    environment = Environment(
        loader=PackageLoader("nostalgia.analysis.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return environment.get_template("template.html").render(page=page, style=style, version=__version__)


def _distinct(folders: Sequence[Path]) -> list[Path]:
    """The folders in the order given, each once: a link counts as what it points at."""
    found: dict[Path, Path] = {}
    for folder in folders:
        found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _read(folder: Path) -> RunFolder:
    run = read_run(folder)
    if not (run.config or run.metrics or run.memory or run.curvature or run.tasks):
        hint = "; it is the folder above" if folder.resolve().name == "results" else ""
        raise NotFoundError(f"{folder}: nothing of a run in it (config.yaml, metrics.csv, results/){hint}")
    return run
