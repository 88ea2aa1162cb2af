"""YAML of plain values: no tags, no references, no depth or size that would take the reader down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nostalgia.errors import NotFoundError

MAX_BYTES = 1 << 19  # a run's config.yaml has some thousand
MAX_DEPTH = 40


def read_yaml(file: Path) -> Any:
    """The plain value in ``file``; raises NotFoundError where it cannot be read or is not plain."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise NotFoundError(f"{file}: cannot be read ({reason})") from None
    reason = why_not_plain(text)
    if reason is not None:
        raise NotFoundError(f"{file}: {reason}")
    return yaml.safe_load(text)


def why_not_plain(text: str) -> str | None:
    """What speaks against reading ``text`` as YAML, in a few words; None where nothing does.

    References (``*name``) can stand for more data than any memory holds; tags (``!!python/object``) can stand for code.
    """
    if len(text) > MAX_BYTES:
        return f"{len(text)} characters of YAML; allowed are {MAX_BYTES}"
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                return f"a reference (*{event.anchor}), which is not allowed"
            tag = getattr(event, "tag", None)
            if tag is not None:
                return f"a tag ({tag[:60]}), which is not allowed"
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                return f"more than {MAX_DEPTH} levels deep"
        yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date or number that there is not
        return f"not YAML ({' '.join(str(error).split())[:100]})"
    return None
