"""Continual-learning methods: one file each, one small protocol (`base.Method`)."""

from nostalgia.methods.base import Method, StepRule
from nostalgia.methods.finetune import Finetune
from nostalgia.methods.joint import Joint
from nostalgia.methods.nostalgia import Nostalgia

__all__ = ["Finetune", "Joint", "Method", "Nostalgia", "StepRule"]
