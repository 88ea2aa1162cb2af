"""Methods by name: the built-in ones, and a class of the user's own as ``module:Class``."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from nostalgia.errors import NotFoundError, UsageError
from nostalgia.methods.base import Method
from nostalgia.options import nearest, read_options

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
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:Class


def method_class(name: str) -> type[Method]:
    """The class called ``name``: one of `BUILT_IN`, or ``module:Class``.

    A module of the user's is imported as Python would: from the working folder, or installed. Raises UsageError for an
    unknown name, a class that is no method or a module that fails, NotFoundError where there is no such module or class.
    """
    if name in BUILT_IN:
        found: type[Method] = getattr(importlib.import_module(f"nostalgia.methods.{name}"), BUILT_IN[name])
        return found
    if not OWN.fullmatch(name):
        raise UsageError(
            f"method={name}: allowed are {', '.join(sorted(BUILT_IN))}, and module:Class of your own"
            f"{nearest(name, BUILT_IN)}"
        )
    return _own_class(name)


def make_method(name: str, options: Mapping[str, Any], seed: int) -> Method:
    """The method called ``name`` with ``options``; raises UsageError for an option it does not have or allow."""
    kind = method_class(name)
    return kind(read_options(kind.Config, options, "method"), seed=seed)


def _own_class(name: str) -> type[Method]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise NotFoundError(
                f"method={name}: there is no module {module_name}; run from its folder, or set PYTHONPATH"
            ) from None
        raise UsageError(f"method={name}: {_place(error)}") from error
    except Exception as error:
        raise UsageError(f"method={name}: {_place(error)}") from error
    kind: Any = getattr(module, class_name, None)
    if kind is None:
        raise NotFoundError(f"method={name}: {module.__file__} has no {class_name}")
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UsageError(f"method={name}: not a class derived from nostalgia.methods.Method")
    if not kind.name:
        kind.name = class_name  # results and reports need one
    found: type[Method] = kind
    return found


def _place(error: BaseException) -> str:
    """The last frame of the traceback of an error in the user's module, and its message."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}: " if trace is not None else ""
    if isinstance(error, SyntaxError):
        where = f"{error.filename}, line {error.lineno}: "
    return f"importing it failed at {where}{type(error).__name__}: {error}"
