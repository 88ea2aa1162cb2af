"""Files that are complete or absent: written aside, synced, renamed; read with one clear line on damage."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeGuard

from nostalgia.errors import NotFoundError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8): ``path`` holds the old or the new one, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as strict JSON (no NaN: raises ValueError), a line for each innermost list."""
    write_atomic(path, dump_json(value) + "\n")


def dump_json(value: Any, indent: str = "") -> str:
    """JSON that a person can read: nested, but lists of plain values and small mappings on one line."""
    flat = json.dumps(value, allow_nan=False, ensure_ascii=False)
    nested = isinstance(value, (dict, list)) and any(isinstance(v, (dict, list)) for v in _values(value))
    if not nested and (isinstance(value, list) or len(indent + flat) <= 110):
        return flat
    inner = indent + "  "
    if isinstance(value, dict):
        lines = [f"{json.dumps(str(k), ensure_ascii=False)}: {dump_json(v, inner)}" for k, v in value.items()]
        return "{\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}}}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + dump_json(v, inner) for v in value) + f"\n{indent}]"
    return flat


def read_json(path: Path) -> Any:
    """The JSON value in ``path``; raises NotFoundError where the file is missing or damaged."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise NotFoundError(f"{path}: not a complete JSON file ({error}); delete it or write it again") from None


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from a file is a finite number, of a size that arithmetic bears."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def read_text(path: Path) -> str:
    """The text in ``path``; raises NotFoundError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise NotFoundError(f"{path}: cannot be read ({reason})") from None


def _values(value: dict[Any, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Let the names in ``folder`` reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
