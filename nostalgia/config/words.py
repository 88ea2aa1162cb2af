"""``KEY=VALUE`` words by Hydra's grammar, and what people write that it cannot read: ``~``, ``#``, ``=``, accents."""

from __future__ import annotations

import functools
import re
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from nostalgia.config.schema import Config
from nostalgia.errors import UsageError

TEXTS = (str, str | None)
PIECE = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^\[\]{},:'"]+|.""", re.DOTALL)
PLAIN = re.compile(r"[\w\s./+*|@?$%\\-]*", re.ASCII)  # what stands in a list or a mapping without quotes


def read_word(word: str) -> Override:
    """A word as Hydra's grammar reads it; a value that it cannot read is taken as the text that it is.

    Raises UsageError, with the way to quote it, for a list or a mapping that cannot be read, and for several values.
    """
    key, _, value = word.partition("=")
    one = _parsed(word)
    if one is None and value[:1] in "[{":
        pieces = PIECE.findall(value)
        one = _parsed(f"{key}={''.join(p if len(p) == 1 or p[0] in _QUOTES else _piece(p) for p in pieces)}")
    elif one is None:
        one = _parsed(f"{key}={quoted(value)}")
    elif key.lstrip("+") in text_keys() and isinstance(one.value(), (bool, int, float)):
        one = _parsed(f"{key}={quoted(value)}")  # "true" and "1_000" are themselves where a text is wanted
    if one is None:
        raise UsageError(f"{word!r} cannot be read as KEY=VALUE; {_how(key)}")
    if one.is_sweep_override():
        raise UsageError(f"{word!r} gives several values; a list is written [a,b]; {_how(key)}")
    return one


def quoted(value: str) -> str:
    """A value in Hydra's grammar, whatever characters it holds."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in _QUOTES:
        value = value[1:-1]
    value = re.sub(r"\\+(?='|$)", lambda match: 2 * match[0], value)  # elsewhere a backslash is one
    return "'" + value.replace("'", "\\'") + "'"


@functools.cache
def text_keys() -> frozenset[str]:
    """Dotted keys of the configuration whose values are texts."""

    def walk(kind: Any, prefix: str) -> list[str]:
        keys = []
        for name, hint in get_type_hints(kind).items():
            keys += walk(hint, f"{prefix}{name}.") if is_dataclass(hint) else [prefix + name] if hint in TEXTS else []
        return keys

    return frozenset(walk(Config, ""))


_QUOTES = "'\""


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _piece(text: str) -> str:
    """What stands between brackets, commas and colons of a list or a mapping, quoted where it must be."""
    bare = text.strip()
    return text if PLAIN.fullmatch(text) or not bare else text.replace(bare, quoted(bare))


def _how(key: str) -> str:
    return f"""a text with commas, brackets or quotes in it is quoted twice, once for the shell: "{key}='a, b'\""""
