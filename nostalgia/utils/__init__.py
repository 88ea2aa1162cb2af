"""Helpers below every other layer: command lines, exit codes, versions, and files of others, which are read as plain values.

Nothing in such a file runs, and what is not a plain value is refused.
"""
