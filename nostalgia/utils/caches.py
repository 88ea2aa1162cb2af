"""Whether a folder that a library keeps its downloads in can be written: else an error is not the data's."""

from __future__ import annotations

import errno
import os
from pathlib import Path

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def unwritable(error: BaseException, folder: str | Path, variable: str) -> str:
    """Why ``error`` comes of a cache ``folder`` that cannot be written, and what to do; empty where it does not.

    ``variable`` is the environment variable that names another folder.
    """
    reason, place = _refused(error) or _blocked(Path(folder).expanduser()), Path(folder)
    return (
        f"the cache {place} cannot be written ({reason}); free it, or set {variable} to another folder"
        if reason
        else ""
    )


def _refused(error: BaseException | None) -> str:
    """The operating system's refusal to write, among ``error`` and its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            return f"{os.strerror(error.errno)}{f': {error.filename}' if error.filename else ''}"
        error = error.__cause__ or error.__context__
    return ""


def _blocked(folder: Path) -> str:
    """What stands in the way of a folder that is to be made or written."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        return f"{there} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"no permission for {there}"
