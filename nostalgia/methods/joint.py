"""Training on the data of all tasks together: the upper bound, no method for a sequence."""

from __future__ import annotations

from nostalgia.methods.base import Method


class Joint(Method):
    name = "joint"
    joint = True
