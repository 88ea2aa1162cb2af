"""Methods by name: the built-in ones, and a class of the user's own as ``module:Class``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from nostalgia.errors import NostalgiaError, UsageError
from nostalgia.methods.base import Method
from nostalgia.options import nearest, read_options
from nostalgia.utils.own_code import code_of, is_own, load_own
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


def method_code(name: str) -> str:
    """A checksum of what the user has written of the method called ``name``; "" for a built-in one."""
    return "" if name in BUILT_IN else code_of(method_class(name))


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
    _check_hooks(name, kind)
    if not vars(kind).get("name"):  # one that it inherits is another method's
        kind.name = name.partition(":")[2]  # results and reports need one
    if kind.name in BUILT_IN:
        raise UsageError(f"method={name}: its name is {kind.name!r}, as a built-in method's; give the class another")
    if not (isinstance(kind.name, str) and re.fullmatch(r"[\w.+-]+", kind.name)):
        raise UsageError(f"method={name}: its name is {kind.name!r:.60}; allowed are letters, digits and _ . + -")
    found: type[Method] = kind
    return found


def hooks_note(name: str) -> str:
    """Which hooks a class of the user's own has, and what looks like one and is none."""
    kind = method_class(name)
    hooks = {hook for hook, member in vars(Method).items() if inspect.isfunction(member) and not hook.startswith("_")}
    defined = {member: None for one in kind.__mro__ if one not in Method.__mro__ for member in vars(one)}
    functions = [m for m in defined if not m.startswith("_") and inspect.isfunction(getattr(kind, m))]
    own = [m for m in functions if m in hooks]
    close = {m: difflib.get_close_matches(m, hooks, n=1, cutoff=0.6) for m in functions if m not in hooks}
    missed = [f"{m} is none (did you mean {found[0]}?)" for m, found in close.items() if found]
    if {"begin_task", "end_task"} & set(own) and "state_dict" not in own:
        missed.append(
            "no state_dict: what begin_task and end_task keep is in no checkpoint, and gone where a run resumes"
        )
    return "; ".join([f"hooks of {kind.__name__}: {', '.join(own) or 'none, which is fine-tuning'}", *missed])


def _check_hooks(name: str, kind: type[Method]) -> None:
    """Raise UsageError for a hook that a run could not call, and for state that nothing would take up."""
    for hook, base in vars(Method).items():
        own = inspect.getattr_static(kind, hook)
        if hook.startswith("_") or not inspect.isfunction(base) or not inspect.isfunction(own):
            continue
        wanted = [p.name for p in inspect.signature(base).parameters.values()]
        try:
            inspect.signature(own).bind(*wanted)
        except TypeError as error:
            called = f"{hook}({', '.join(wanted)})"
            raise UsageError(f"method={name}: {hook} is called as {called}; of this class: {error}") from None
    if kind.state_dict is not Method.state_dict and kind.load_state_dict is Method.load_state_dict:
        raise UsageError(f"method={name}: it has state_dict but no load_state_dict: no run of it could be resumed")
