"""Sizes in words."""

from __future__ import annotations


def num_bytes(value: float) -> str:
    """
    >>> num_bytes(608_174_080), num_bytes(1.1e10)
    ('580 MiB', '10.2 GiB')
    """
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            scaled = value / 2**power
            return f"{scaled:.0f} {name}" if scaled >= 100 else f"{scaled:.3g} {name}"
    return f"{value:.0f} B"
