"""Errors a user can act on: each carries one clear line and the exit code of the process."""

from __future__ import annotations


class NostalgiaError(Exception):
    """A failure with a message for the user: what, where, what is allowed, what to do."""

    exit_code = 1


class UsageError(NostalgiaError):
    """A command line or configuration that cannot be run (exit code 2)."""

    exit_code = 2


class NotFoundError(NostalgiaError):
    """Data, weights or a run folder that is missing or unreadable (exit code 3)."""

    exit_code = 3


class RunFailedError(NostalgiaError):
    """A run that cannot go on: non-finite loss, failed eigensolve, diverged ranks (exit code 4)."""

    exit_code = 4


class InterruptedRun(NostalgiaError):
    """A run stopped by a signal after it wrote a checkpoint (exit code 75: may be requeued)."""

    exit_code = 75
