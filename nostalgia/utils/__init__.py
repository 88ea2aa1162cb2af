"""Helpers below every other layer: command lines, exit codes, versions, and files.

Files of others are read as plain values: nothing in one runs, and what is not a plain value is refused.
"""
