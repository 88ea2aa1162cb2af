"""A frozen backbone with a head for each task: nothing is forgotten, and the backbone learns nothing."""

from __future__ import annotations

from nostalgia.methods.base import Method


class HeadsOnly(Method):
    """The floor that a method must beat in final accuracy. Keeps nothing."""

    name = "heads_only"
    frozen_backbone = True
