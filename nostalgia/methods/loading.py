"""A method of the user's own, by the name of its class."""

from __future__ import annotations

import importlib
from typing import Any

from nostalgia.errors import NotFoundError, UsageError
from nostalgia.methods.base import Method
from nostalgia.projection import CurvatureMemory


def load_method(name: str, memory: CurvatureMemory) -> Method:
    """The method that ``module:Class`` names, made as ``Class(memory)``.

    The module is imported as Python would: from the working folder, or installed. Raises NotFoundError where there is
    no such module or class, UsageError for a class that is no method.
    """
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # an import of the user's module itself
        raise NotFoundError(
            f"method.name={name}: there is no module {module_name}; run from its folder, or set PYTHONPATH"
        ) from None
    kind: Any = getattr(module, class_name, None)
    if kind is None:
        raise NotFoundError(f"method.name={name}: {module.__file__} has no {class_name}")
    if Method not in getattr(kind, "__mro__", ()):
        raise UsageError(f"method.name={name}: not a class derived from nostalgia.methods.Method")
    method: Method = kind(memory)
    return method
