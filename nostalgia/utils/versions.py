"""Versions of the packages that the numbers of a run depend on."""

from __future__ import annotations

import platform
from importlib.metadata import version

PACKAGES = ("torch", "accelerate", "transformers", "peft", "hessian-eigenthings")


def versions() -> dict[str, str]:
    """By package, with Python's own."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
