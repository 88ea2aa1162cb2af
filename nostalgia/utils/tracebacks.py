"""Where an error of the user's own code came from, in one line."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def last_frame(error: BaseException) -> str:
    """``FILE, line N: KIND: message`` of the last frame of an error's traceback; of a file that is no Python, its line."""
    if isinstance(error, SyntaxError):
        return _line(error.filename, error.lineno, error)
    frames = traceback.extract_tb(error.__traceback__)
    return _line(frames[-1].filename, frames[-1].lineno, error) if frames else _line(None, None, error)


def own_frame(error: BaseException) -> str:
    """The same of the last frame that is neither this program's nor an installed library's; empty where there is none."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if is_own_file(frame.filename)]
    return _line(own[-1].filename, own[-1].lineno, error) if own else ""


def is_own_file(file: str) -> bool:
    """Whether ``file`` is there and neither this program's nor an installed library's."""
    path = Path(file)
    return path.is_file() and not path.resolve().is_relative_to(PACKAGE) and not file.startswith(LIBRARIES)


def _line(file: str | None, line: int | None, error: BaseException) -> str:
    where = f"{file}, line {line}: " if file is not None else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"
