"""Plain sequential fine-tuning: the lower bound every continual-learning method is held against."""

from __future__ import annotations

from nostalgia.methods.base import Method


class Finetune(Method):
    name = "finetune"
