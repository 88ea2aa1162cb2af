"""Options as dataclass fields that carry what is allowed, and reading them from plain values.

A component (a method, a section of the configuration) declares its options as a dataclass whose fields are made by
`option`; `read_options` turns a mapping into an instance, or says in one line what is wrong with it.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from nostalgia.errors import UsageError

T = TypeVar("T")


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    factory: Any = MISSING,
    free: bool = False,
) -> Any:
    """A dataclass field with what it allows.

    ``low`` is the least value, ``above`` a bound that is itself not allowed, ``high`` the greatest; ``choices`` are the
    words allowed. ``free``: a resumed run may change it, because nothing that is computed depends on it but for rounding.
    """
    metadata = {"help": help, "low": low, "above": above, "high": high, "choices": choices, "free": free}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def read_options(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """``kind`` made of ``values``; ``where`` is the prefix of its keys in messages, such as ``method``.

    Raises UsageError for a name that is no field, a value of another type, or one out of range.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     strength: float = option(1.0, "Of the penalty.", low=0)
        >>> read_options(Options, {"strength": 3}, "method")
        Options(strength=3.0)
    """
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            allowed = f"; its options are {', '.join(known)}" if known else "; it has no options"
            raise UsageError(f"unknown key {where}.{name}{nearest(name, known)}{allowed}")
    hints = get_type_hints(kind)
    given = {name: _converted(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    made = kind(**given)
    check_options(made, where)
    return made


def check_options(made: Any, where: str) -> None:
    """Raise UsageError for the first field of a dataclass (and those within) whose value is not allowed."""
    for item in fields(made):
        value, key = getattr(made, item.name), f"{where}.{item.name}" if where else item.name
        if is_dataclass(value):
            check_options(value, key)
        elif value is not None:
            check_value(item, value, key)


def check_value(item: Field[Any], value: Any, key: str) -> None:
    """Raise UsageError, naming ``key``, for a value that the field does not allow."""
    allowed = item.metadata
    if allowed.get("choices") is not None and value not in allowed["choices"]:
        words = allowed["choices"]
        raise UsageError(f"{key}={value}: allowed are {', '.join(words)}{nearest(str(value), words)}")
    low, above, high = (allowed.get(name) for name in ("low", "above", "high"))
    if low is None and above is None and high is None:
        return
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, str):
            continue
        fits = (low is None or number >= low) and (above is None or number > above) and (high is None or number <= high)
        if not fits or math.isnan(number) or math.isinf(number):
            raise UsageError(f"{key}={value}: allowed is {range_text(low, above, high)}")


def range_text(low: float | None, above: float | None, high: float | None) -> str:
    """A range in words: ``1 or more``; ``more than 0, up to 0.9``."""
    parts = [f"{low:g} or more"] if low is not None else []
    parts += [f"more than {above:g}"] if above is not None else []
    if high is None:
        return ", ".join(["a finite number", *parts])
    return ", ".join([*parts, f"up to {high:g}"])


def nearest(word: str, options: Iterable[str]) -> str:
    """``; did you mean X?`` for the option closest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _converted(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the field's type wants it; only conversions that lose nothing."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in kinds:
            return None
        raise UsageError(f"{key}=null: allowed is {_type_text(kinds)}")
    for kind in kinds:
        plain = get_origin(kind) or kind
        if plain is Any:
            return value
        if plain is bool and isinstance(value, bool):
            return value
        if plain is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if plain is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if plain is str and isinstance(value, (str, bool, int, float)):
            return str(value).lower() if isinstance(value, bool) else str(value)
        if plain in (list, tuple) and isinstance(value, (list, tuple)):
            return plain(value)
        if plain is dict and isinstance(value, Mapping):
            return dict(value)
    raise UsageError(f"{key}={value}: allowed is {_type_text(kinds)}")


def _type_text(kinds: Sequence[Any]) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", type(None): "null"}
    return " or ".join(words.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
