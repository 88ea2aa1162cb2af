"""The table of methods as LaTeX and as Markdown, ready to paste."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nostalgia.analysis.aggregate import MethodRow, Value
from nostalgia.logging.results import COSTS, METRICS

HEADS = {
    "acc": "ACC",
    "class_incremental_acc": "CI-ACC",
    "bwt": "BWT",
    "forgetting": "F",
    "learning_accuracy": "LA",
    "fwt": "FWT",
    "memory_bytes": "MB",
    "extra_seconds": "extra s",
}
DIGITS = 3
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def latex_table(rows: Sequence[MethodRow]) -> str:
    r"""A ``tabular`` for the booktabs package; mean ± standard deviation over seeds."""
    body = [[escape_latex(row.method), str(len(row.seeds)), *_cells(row, _latex_value)] for row in rows]
    lines = [
        r"\begin{tabular}{l" + "r" * (len(HEADS) + 1) + "}",
        r"\toprule",
        _latex_line(["Method", "Seeds", *HEADS.values()]),
        r"\midrule",
        *map(_latex_line, body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


def markdown_table(rows: Sequence[MethodRow]) -> str:
    """A GitHub table; mean ± standard deviation over seeds."""
    head = ["method", "seeds", *HEADS.values()]
    body = [[escape_markdown(row.method), str(len(row.seeds)), *_cells(row, _markdown_value)] for row in rows]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [head, rule, *body]
    )


def escape_latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


def escape_markdown(text: str) -> str:
    """Characters that Markdown or its HTML would read as more than text, and line breaks."""
    text = " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
    return "".join(f"\\{c}" if c in "\\|*_`[]" else c for c in text)


def _cells(row: MethodRow, show: Callable[[Value], str]) -> list[str]:
    values = [row.values[name] for name in METRICS]
    costs = [cost_text(row, name) for name in COSTS]
    return [*("--" if value is None else show(value) for value in values), *("--" if c == "-" else c for c in costs)]


def cost_text(row: MethodRow, name: str) -> str:
    """The mean over seeds: bytes in MB, or seconds."""
    value = row.values[name]
    if value is None:
        return "-"
    return f"{value.mean / 1e6:.3g}" if name == "memory_bytes" else f"{value.mean:.1f}"


def _latex_value(value: Value) -> str:
    text = value.text(DIGITS, plus_minus=r" \pm ")
    return f"${text}$"


def _markdown_value(value: Value) -> str:
    return value.text(DIGITS)


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"
