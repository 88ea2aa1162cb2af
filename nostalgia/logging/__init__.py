"""What training writes and shows: trackers, CSV files, console, progress, results.

Submodules are imported by name, so that a command loads what it uses.
"""
