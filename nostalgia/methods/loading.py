"""Methods by name: the built-in ones, and a class of the user's own as ``module:Class``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from nostalgia.errors import NostalgiaError, UsageError
from nostalgia.methods.base import Method
from nostalgia.options import nearest, read_options
from nostalgia.utils.own_code import is_own, load_own
from nostalgia.utils.tracebacks import last_frame

BUILT_IN: dict[str, str] = {
    "agem": "AGem",
    "averaging": "Averaging",
    "derpp": "DarkExperienceReplay",
    "er": "ExperienceReplay",
    "ewc": "Ewc",
    "ewc_lora": "EwcLora",
    "finetune": "Finetune",
    "gpm": "Gpm",
    "heads_only": "HeadsOnly",
    "joint": "Joint",
    "kronecker": "Kronecker",
    "l2sp": "L2Sp",
    "lwf": "Lwf",
    "nostalgia": "Nostalgia",
    "nostalgia_ewc": "NostalgiaEwc",
    "si": "SynapticIntelligence",
}


def method_class(name: str) -> type[Method]:
    """The class called ``name``: one of `BUILT_IN`, or ``module:Class``.

    A module of the user's is imported as Python would: from the working folder, or installed. Raises UsageError for an
    unknown name, a class that is no method or a module that fails, NotFoundError where there is no such module or class.
    """
    if name in BUILT_IN:
        found: type[Method] = getattr(importlib.import_module(f"nostalgia.methods.{name}"), BUILT_IN[name])
        return found
    if not is_own(name):
        raise UsageError(
            f"method={name}: allowed are {', '.join(sorted(BUILT_IN))}, and module:Class of your own"
            f"{nearest(name, BUILT_IN)}"
        )
    return _own_class(name)


def make_method(name: str, options: Mapping[str, Any], seed: int) -> Method:
    """The method called ``name`` with ``options``; raises UsageError for an option it does not have or allow."""
    kind = method_class(name)
    config = read_options(kind.Config, options, "method")
    try:
        return kind(config, seed=seed)
    except Exception as error:
        if name in BUILT_IN or isinstance(error, NostalgiaError):
            raise
        raise UsageError(
            f"method={name}: making it by {kind.__name__}(config, seed) failed at {last_frame(error)}"
        ) from error


def _own_class(name: str) -> type[Method]:
    kind: Any = load_own(name, f"method={name}")
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UsageError(f"method={name}: not a class derived from nostalgia.methods.Method")
    if not is_dataclass(kind.Config):
        raise UsageError(f"method={name}: its Config is {kind.Config!r:.60}; allowed is a dataclass of options")
    if not kind.name:
        kind.name = name.partition(":")[2]  # results and reports need one
    if not (isinstance(kind.name, str) and re.fullmatch(r"[\w.+-]+", kind.name)):
        raise UsageError(f"method={name}: its name is {kind.name!r:.60}; allowed are letters, digits and _ . + -")
    found: type[Method] = kind
    return found
