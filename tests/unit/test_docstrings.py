"""Examples in docstrings run, and each of the library's public pieces has one, or is in another's."""

from __future__ import annotations

import doctest
import importlib

import pytest

import nostalgia

MODULES = sorted({*nostalgia._HOME.values(), "nostalgia.linalg.vector_space", "nostalgia.evaluation.transfer",
                  "nostalgia.options", "nostalgia.utils.sizes"})  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0
    assert (
        found.attempted > 0 or name == "nostalgia.projection.kronecker_memory"
    )  # in that of the factors it is filled with
