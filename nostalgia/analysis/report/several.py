"""The page of several runs: methods and seeds side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nostalgia.analysis.aggregate import MethodRow, by_method, doubts, place, same_tasks, summarise
from nostalgia.analysis.drawing import CAPTIONS, comparison_drawers
from nostalgia.analysis.figures_frontier import CAPTION, frontier_figure
from nostalgia.analysis.figures_theory import forgetting_prediction
from nostalgia.analysis.frontier import HEAD, Frontier, cells, note
from nostalgia.analysis.report.blocks import Block, Code, Page, Pictures, Table, Text, picture
from nostalgia.analysis.report.tables import HEADS, cost_text, latex_table, markdown_table
from nostalgia.analysis.report.words import fraction
from nostalgia.analysis.run_folder import RunFolder, finished_tasks, tell_apart
from nostalgia.analysis.settings import differences
from nostalgia.analysis.strengths import at_chosen, frontier_of
from nostalgia.logging.console import METRIC_MEANINGS, METRIC_TITLES
from nostalgia.logging.csv_log import Record
from nostalgia.logging.progress import duration
from nostalgia.logging.results import COSTS, METRICS


def comparison_page(runs: Sequence[RunFolder], select_seeds: Sequence[int] = ()) -> Page:
    """Methods with mean and standard deviation over seeds, and what sets the runs apart; unfinished ones by name.

    Where methods were run at several strengths, the comparison at equal learning accuracy comes first, and what follows
    shows each method at the strength chosen there; ``select_seeds`` are those strengths are chosen on.
    """
    tell_apart(runs)
    runs = sorted(runs, key=lambda run: (place(run.label), run.results.seed if run.results else math.inf))
    finished = [run for run in runs if run.results is not None]
    found = frontier_of(finished, select_seeds)
    shown = finished if found is None else at_chosen(finished, found)
    rows = by_method(shown)
    page = Page(title=_listed([row.method for row in rows]) or f"{len(runs)} runs", subtitle=_subtitle(runs, rows))
    page.notes = [*doubts(rows), *_unfinished(runs)]
    pictures = Pictures({}, CAPTIONS)
    drawn: list[Block | None] = []
    if found is not None:
        page.add(
            "At equal learning accuracy",
            picture("frontier", frontier_figure(found), CAPTION),
            _frontier(found),
        )
    if rows and same_tasks(shown):
        groups = {row.method: row.runs for row in rows}
        pictures = Pictures(comparison_drawers(groups), CAPTIONS)
        drawn = [pictures(name) for name in pictures.drawers]
    if rows:
        title = "Methods" if found is None else "Methods, at these strengths"
        page.add(title, _method_table(rows), _meanings(), *drawn, _task_table(rows))
        page.add("To paste", Code(latex_table(rows), "LaTeX (booktabs)"), Code(markdown_table(rows), "Markdown"))
    page.add("Forgetting, predicted and measured", _predictions(runs, pictures))
    page.add("Runs", _run_table(runs))
    page.add("Configuration: where the runs differ", _differences(runs))
    skipped = [f"figure {name}: {why}" for name, why in pictures.skipped.items()]
    page.add("Not shown", Text(skipped) if skipped else None)
    return page


def _subtitle(runs: Sequence[RunFolder], rows: Sequence[MethodRow]) -> str:
    parts = [f"{len(runs)} runs"]
    if rows:
        parts.append(f"{len(rows)} method{'s' if len(rows) > 1 else ''}")
        seeds = sorted({seed for row in rows for seed in row.seeds})
        parts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
        parts.append(f"{len(rows[0].runs[0].tasks)} tasks")
    return " · ".join(parts)


def _unfinished(runs: Sequence[RunFolder]) -> list[str]:
    return [
        f"{run.path}: no results yet, {finished_tasks(run)} of its tasks evaluated; it counts in no mean"
        for run in runs
        if run.results is None
    ]


def _method_table(rows: Sequence[MethodRow]) -> Block:
    head = ["method", "seeds", *HEADS.values(), "time"]
    body = []
    for row in rows:
        values = [row.values[name] for name in METRICS]
        seconds = row.values["seconds"]
        body.append(
            [
                row.method,
                ", ".join(map(str, row.seeds)),
                *("-" if v is None else v.text() for v in values),
                *(cost_text(row, name) for name in COSTS),
                "-" if seconds is None else duration(seconds.mean),
            ]
        )
    several = any(len(row.seeds) > 1 for row in rows)
    meaning = "± is the standard deviation over seeds (n - 1). " if several else ""
    meaning += "MB: kept between tasks. extra s: added by the method."
    return Table(head, body, caption="Mean over seeds", note=meaning, words=2)


def _frontier(found: Frontier) -> Block:
    body = [cells(row) for row in found.rows]
    return Table(HEAD, body, caption="Each method at its chosen strength", note=note(found), words=2)


def _meanings() -> Block:
    return Text([f"{HEADS[name]}: {METRIC_TITLES[name]}, {METRIC_MEANINGS[name]}." for name in METRICS])


def _task_table(rows: Sequence[MethodRow]) -> Block | None:
    """Final accuracy on each task, mean and standard deviation over seeds."""
    runs = [run for row in rows for run in row.runs]
    if not same_tasks(runs):
        return None
    body = []
    for u, task in enumerate(runs[0].tasks):
        cells = []
        for row in rows:
            finals = [run.results.final_accuracies()[u] for run in row.runs if run.results is not None]
            value = summarise(finals)
            cells.append("-" if value is None else value.text())
        body.append([task, *cells])
    return Table(["task", *(row.method for row in rows)], body, caption="Accuracy on each task at the end")


def _predictions(runs: Sequence[RunFolder], pictures: Pictures) -> Block | None:
    groups: dict[str, list[Record]] = {}
    for run in runs:
        groups.setdefault(run.label, []).extend(run.forgetting["rows"])
    groups = {name: rows for name, rows in groups.items() if rows}
    if not groups:
        return None
    drawers = {**pictures.drawers, "forgetting_prediction": lambda: forgetting_prediction(groups, "method")}
    own = Pictures(drawers, CAPTIONS)
    made = own("forgetting_prediction")
    pictures.skipped.update(own.skipped)
    return made


def _run_table(runs: Sequence[RunFolder]) -> Block:
    body = []
    for run in runs:
        results = run.results
        if results is None:
            body.append([str(run.path), run.label, *["-"] * (len(METRICS) + 3)])
            continue
        values = [fraction(getattr(results, name)) for name in METRICS]
        details = [str(results.world_size), duration(results.seconds)]
        body.append([str(run.path), results.method, str(results.seed), *values, *details])
    head = ["folder", "method", "seed", *(HEADS[name] for name in METRICS), "ranks", "time"]
    return Table(head, body, caption="Every run", words=2)


def _differences(runs: Sequence[RunFolder]) -> Block | None:
    """A column for each set of runs with the same settings."""
    found = differences([run.config for run in runs])
    if not found:
        return Text(["Nothing but seed and folder."]) if any(run.config for run in runs) else None
    columns: dict[tuple[str, ...], list[RunFolder]] = {}
    for run, *values in zip(runs, *found.values(), strict=True):
        columns.setdefault(tuple(values), []).append(run)
    body = [[key, *(values[i] for values in columns)] for i, key in enumerate(found)]
    return Table(["key", *map(_named, columns.values())], body, words=len(columns) + 1)


def _named(runs: Sequence[RunFolder]) -> str:
    """``nostalgia, seeds 0, 1``, or the folders of runs that have no results."""
    methods = _listed(list(dict.fromkeys(run.label for run in runs)))
    seeds = [str(run.results.seed) for run in runs if run.results is not None]
    if len(seeds) < len(runs):
        return ", ".join(run.path.name for run in runs)
    return f"{methods}, seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
