"""What people see of a run: trackers, progress, console, results files, figures, tables, the report.

Submodules are imported by name, so that drawing a figure does not load the trackers.
"""
