"""The page of one run, from whatever its folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from nostalgia.analysis.drawing import CAPTIONS, RUN_FIGURES, run_drawers
from nostalgia.analysis.figures_own import load_figures
from nostalgia.analysis.report.blocks import Block, Code, Page, Pairs, Picture, Pictures, Table, Text
from nostalgia.analysis.report.words import PREDICTION, fraction, significant
from nostalgia.analysis.run_figure import ACCURACY, CURVATURE, PREDICTED, TRAINING
from nostalgia.analysis.run_folder import RunFolder, finished_tasks
from nostalgia.analysis.settings import flat, text_of
from nostalgia.evaluation import transfer
from nostalgia.logging.console import METRIC_MEANINGS, METRIC_TITLES
from nostalgia.logging.progress import duration
from nostalgia.logging.results import METRICS, measures

CLASSES_SHOWN = 12
ROWS_SHOWN = 36
NAMES = {"torch": "PyTorch", "python": "Python"}


def run_page(run: RunFolder, own_figures: Sequence[str] = ()) -> Page:
    """Everything about ``run``; sections whose files are missing are left out, and the last one says why.

    ``own_figures``: functions of the user's as ``module:function``, a section of their own.
    """
    drawers = run_drawers(run)
    own = load_figures(own_figures, drawers)
    pictures = Pictures({**drawers, **{figure.name: partial(figure.draw, run) for figure in own}}, CAPTIONS)
    page = Page(title=_title(run), subtitle=_subtitle(run), cards=_cards(run), notes=_notes(run))

    def of(section: str) -> list[Picture | None]:
        return [pictures(figure.name) for figure in RUN_FIGURES if figure.section == section]

    page.add(ACCURACY, *of(ACCURACY), _task_table(run), _unknown_table(run), _class_table(run))
    explained = Text(PREDICTION) if run.forgetting["rows"] else None
    page.add(PREDICTED, explained, *of(PREDICTED), prediction_table(run), _expansion_table(run))
    page.add(CURVATURE, *of(CURVATURE), _curvature_table(run))
    page.add(TRAINING, *of(TRAINING))
    page.add("Your figures", *(pictures(figure.name, figure.caption) for figure in own))
    page.add("Configuration", *configuration(run))
    page.add("Environment", _environment(run))
    page.add("Not shown", _missing(run, pictures))
    return page


def _title(run: RunFolder) -> str:
    experiment = run.config.get("experiment")
    name = experiment.get("name") if isinstance(experiment, dict) else None
    method = run.method or "run"
    return f"{name}: {method}" if name and name != method else method


def _subtitle(run: RunFolder) -> str:
    parts = [run.path.resolve().name]
    if run.tasks:
        parts.append(f"{len(run.tasks)} task{'s' if len(run.tasks) > 1 else ''}")
    if run.results is not None:
        ranks = run.results.world_size
        parts += [f"seed {run.results.seed}", f"{ranks} process{'es' if ranks > 1 else ''}"]
        parts.append(duration(run.results.seconds))
    return " · ".join(parts)


def _cards(run: RunFolder) -> list[tuple[str, str, str]]:
    if not run.matrix:
        return []
    values = run.results.metrics() if run.results else measures(run.matrix)
    return [(METRIC_TITLES[name], fraction(values[name]), METRIC_MEANINGS[name]) for name in METRICS if name in values]


def _notes(run: RunFolder) -> list[str]:
    if run.results is not None:
        return []
    done = finished_tasks(run)
    seen = f"the numbers are those after {done} finished task{'s' if done > 1 else ''}" if done else "no task finished"
    return [f"This run has not finished, or its results cannot be read: {seen}."]


def _task_table(run: RunFolder) -> Block | None:
    rows = transfer.finished_rows(run.matrix)
    if not rows:
        return None
    last = len(rows) - 1
    body = []
    for u, task in enumerate(run.tasks):
        column = [row[u] for row in rows]
        known = [value for value in column if value is not None]
        earlier = [value for value in column[:last] if value is not None]
        drop = max(earlier) - column[last] if earlier and column[last] is not None else None  # type: ignore[operator]
        learned = column[u] if u <= last else None
        best = max(known) if known else None
        body.append([task, *(fraction(v) for v in (learned, best, column[last], drop))])
    return Table(
        ["task", "learned", "best", "now", "forgotten"],
        body,
        caption="Accuracy on each task",
        note="learned: right after its training; now: after the last task; forgotten: best before the last task, "
        "minus now. Fractions of the validation images.",
    )


def _class_table(run: RunFolder) -> Block | None:
    if run.results is None or not any(run.results.classes):
        return None
    body = []
    for task, names in zip(run.tasks, run.results.classes, strict=False):
        shown = ", ".join(names[:CLASSES_SHOWN])
        more = f", … and {len(names) - CLASSES_SHOWN} more" if len(names) > CLASSES_SHOWN else ""
        body.append([task, shown + more, str(len(names))])
    return Table(["task", "names", "classes"], body, caption="Classes", words=2)


def prediction_table(run: RunFolder) -> Block | None:
    """A row for each finished task after each later one; those after the last task only where they are many."""
    rows = run.forgetting["rows"]
    if not rows:
        return None
    note = "In nats a sample. Inside: within the task's eigenvectors; outside: the rest, as if even."
    if len(rows) > ROWS_SHOWN:
        rows = [row for row in rows if row.get("after") == rows[-1].get("after")]
        note += " After the last task only; results/forgetting_prediction.json has all."
    columns = {
        "measured": "measured",
        "predicted": "predicted",
        "linear": "g·d",
        "inside": "inside",
        "outside": "outside",
        "kronecker": "Kronecker",
        "exact": "exact",
        "bound": "bound",
        "displacement": "|d|",
    }
    if all(row.get("exact") is None for row in rows):
        del columns["exact"]
    body = [[str(r["task"]), str(r.get("after", "")), *(significant(r.get(term)) for term in columns)] for r in rows]
    head = ["task", "after", *columns.values()]
    return Table(head, body, caption="Increase of the loss of finished tasks", note=note, words=2)


def _expansion_table(run: RunFolder) -> Block | None:
    terms = ("loss", "gradient_norm", "eigenpairs", "eigenvalue_k", "trace", "trace_error")
    body = [[str(t["task"]), *(significant(t.get(term)) for term in terms)] for t in run.forgetting["tasks"]]
    head = ["task", "loss", "|g|", "pairs k", "λₖ", "tr H", "± (1 s.e.)"]
    return Table(head, body, caption="What was kept at the end of each task") if body else None


def _unknown_table(run: RunFolder) -> Block | None:
    """The measures with the task known and unknown, side by side."""
    results = run.results
    if results is None or results.class_incremental is None:
        return None
    names = ("acc", "bwt", "forgetting", "learning_accuracy")
    body = [
        [METRIC_TITLES[n], fraction(getattr(results, n)), fraction(results.class_incremental.get(n))] for n in names
    ]
    note = "Task unknown (class-incremental): arg-max over the heads of all tasks seen, which is not trained for."
    return Table(["measure", "task known", "task unknown"], body, caption="Task known and unknown", note=note)


def _curvature_table(run: RunFolder) -> Block | None:
    body = []
    for c in run.curvature:
        body.append(
            [
                c.task,
                significant(c.eigenvalues[0]),
                significant(c.eigenvalues[-1]),
                f"{sum(map(bool, c.converged))} of {len(c.eigenvalues)}",
                text_of(c.raw.get("products")),
                significant(c.raw.get("seconds")),
                str(len(c.memory_eigenvalues)),
            ]
        )
    head = ["task", "λ₁", "λₖ", "converged", "products", "seconds", "memory"]
    note = "products: with the curvature matrix; memory: protected directions after the task."
    return Table(head, body, caption="Eigenpairs of each task", note=note) if body else None


def configuration(run: RunFolder) -> list[Block]:
    """The configuration as run, a block a group."""
    blocks: list[Block] = []
    loose: dict[str, Any] = {}
    for group, values in run.config.items():
        if isinstance(values, dict) and values:
            blocks.append(Pairs(str(group), list(flat(values))))
        else:
            loose[str(group)] = values
    if loose:
        blocks.append(Pairs("further", list(flat(loose))))
    if blocks:
        blocks.insert(0, Code(f"python -m nostalgia.train --config {run.path / 'config.yaml'}", "To run it again"))
    return blocks


def _environment(run: RunFolder) -> Block | None:
    """Versions and devices, as the run wrote them; nothing of this machine's environment."""
    results = run.results
    if results is None:
        return None
    items = [(NAMES.get(name, name), str(version)) for name, version in results.versions.items()]
    items.append(("processes", str(results.world_size)))
    for name, value in results.details.items():
        items.append((name.replace("_", " "), _detail(value)))
    items.append(("seconds in all", f"{results.seconds:.1f}"))
    return Pairs("", items)


def _detail(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(v, (int, float)) for v in value):
        return ", ".join(f"{v:.1f}" for v in value)
    return text_of(value)


def _missing(run: RunFolder, pictures: Pictures) -> Block | None:
    lines: Sequence[str] = [
        *(reason for reason in dict.fromkeys(run.problems.values())),
        *(f"figure {name}: {why}" for name, why in pictures.skipped.items() if why not in run.problems.values()),
    ]
    return Text(lines) if lines else None
