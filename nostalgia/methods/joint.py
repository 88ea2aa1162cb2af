"""All tasks' data together: the upper bound, no method for a sequence."""

from __future__ import annotations

from nostalgia.methods.finetune import Finetune


class Joint(Finetune):
    name = "joint"
    joint = True
