"""Loads code of the user's own, named on the command line as ``module:Name``."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from nostalgia.errors import NotFoundError, UsageError
from nostalgia.utils.tracebacks import is_own_file, last_frame

WORD = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:Name


def is_own(word: str) -> bool:
    """Whether ``word`` has the form ``module:Name``."""
    return WORD.fullmatch(word) is not None


def code_of(kind: type) -> str:
    """A checksum of the files of the user's own that a class and those it derives from are written in; "" without any."""
    files = {getattr(sys.modules.get(one.__module__), "__file__", None) for one in kind.__mro__}  # C code has none
    own = sorted(file for file in files if file is not None and is_own_file(file))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in own)).hexdigest()[:16] if own else ""


def load_own(word: str, where: str) -> Any:
    """The object that ``word``, ``module:Name``, names; errors begin with ``where``, the option it was given to.

    The module is imported as Python would: from the working folder, or installed. Raises NotFoundError where there is no
    such module or name, UsageError where importing it fails.
    """
    module_name, _, name = word.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and module_name.startswith(error.name):
            raise NotFoundError(
                f"{where}: there is no module {module_name}; run from its folder, or set PYTHONPATH"
            ) from None
        raise UsageError(f"{where}: importing it failed at {last_frame(error)}") from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{where}: importing it failed at {last_frame(error)}") from error
    found = getattr(module, name, None)
    if found is None:
        raise NotFoundError(f"{where}: {module.__file__} has no {name}")
    return found
