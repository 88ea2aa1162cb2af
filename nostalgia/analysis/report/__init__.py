"""results/report.html: one self-contained page about a run, or about several side by side."""

from nostalgia.analysis.report.page import write_report

__all__ = ["write_report"]
