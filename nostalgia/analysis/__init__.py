"""Reads the folders of runs: figures, tables, comparisons, the report, and what a run would cost.

Submodules are imported by name. Training calls this package once, at its end.
"""
