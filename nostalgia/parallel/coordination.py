"""Work that ranks must agree on: if one of them cannot, none goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from nostalgia import errors
from nostalgia.errors import NostalgiaError

T = TypeVar("T")


def agree(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank; where it raises a NostalgiaError on any, the first rank's is raised on all."""
    result, mine = _attempt(work)
    for kind, message in gather_object([mine]):
        if kind is not None:
            raise getattr(errors, kind)(message)
    return result  # type: ignore[return-value]


def main_first(accelerator: Accelerator, work: Callable[[bool], T]) -> T:
    """Run ``work(is_main)`` on rank 0, then on the others: what it downloads is there once; errors as in `agree`."""
    result, failed = None, None
    if accelerator.is_main_process:
        result, failed = _attempt(lambda: work(True))
    failed = from_main(accelerator, failed)
    if failed is not None and failed[0] is not None:
        raise getattr(errors, failed[0])(failed[1])
    if accelerator.is_main_process:
        return agree(accelerator, lambda: result)  # type: ignore[return-value]
    return agree(accelerator, lambda: work(False))


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 only and give its (small) result, or its error, to all."""
    outcome = _attempt(work) if accelerator.is_main_process else None
    result, (kind, message) = from_main(accelerator, outcome)  # type: ignore[misc]
    if kind is not None:
        raise getattr(errors, kind)(message)
    return result  # type: ignore[return-value]


def from_main(accelerator: Accelerator, value: T) -> T:
    """Rank 0's ``value`` on all ranks."""
    if accelerator.num_processes == 1:
        return value
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def _attempt(work: Callable[[], T]) -> tuple[T | None, tuple[str | None, str]]:
    try:
        return work(), (None, "")
    except NostalgiaError as error:
        return None, (type(error).__name__, str(error))
