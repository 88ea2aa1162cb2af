"""The most bytes that a solver holds at once in its vectors: torch storages and numpy arrays, products left out."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

SMALL = 4096  # bytes; smaller storages are coefficients, not vectors


class Held(TorchDispatchMode):
    """While entered, follows every storage made outside `paused`; ``peak`` is the most that lived at once.

    torch's memory is counted storage by storage, numpy's by tracemalloc. What a product needs inside (graphs,
    activations) is left out: it is the operator's, not the solver's; what it returns is counted.
    """

    def __init__(self, numpy: bool = True) -> None:
        super().__init__()
        self.numpy = numpy  # tracing numpy slows Python down: not while a solve is timed
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()
        self._numpy_base = 0

    def __enter__(self) -> Held:
        if self.numpy:
            tracemalloc.start()
            self._numpy_base = tracemalloc.get_traced_memory()[0]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._note()
        super().__exit__(*error)
        if self.numpy:
            tracemalloc.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._follow(result)
        return result

    @contextmanager
    def paused(self) -> Iterator[list[Any]]:
        """Inside, nothing is followed but what is appended to the list."""
        self._note()
        results: list[Any] = []
        with _disable_current_modes():
            yield results
        if self.numpy:
            tracemalloc.reset_peak()
        self._follow(results)
        self._note()

    def _follow(self, values: Any) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor) or value.untyped_storage().nbytes() < SMALL:
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            self._known.add(key)
            self._live += storage.nbytes()
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        self._note()

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size

    def _note(self) -> None:
        traced = tracemalloc.get_traced_memory()[1] - self._numpy_base if self.numpy else 0
        self.peak = max(self.peak, self._live + traced)
