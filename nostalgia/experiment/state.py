"""Where a run is and what it has measured so far: plain values, which a checkpoint keeps as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

# What happens in a round, one task or (joint training) all of them together. A method skips what it does not need.
STAGES = ("baseline", "warmup", "train", "end", "evaluate")

Matrix = list[list[float | None]]


@dataclass
class RunState:
    """``step`` counts the optimizer steps of all stages before this one."""

    round: int = 1  # counts from 1; one beyond the last when the run is complete
    stage: str = STAGES[0]
    step: int = 0
    tasks: int = 0  # that have been trained
    matrix: Matrix = field(default_factory=list)
    class_incremental: Matrix = field(default_factory=list)
    before: list[float | None] = field(default_factory=list)
    baseline: list[float | None] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)  # of the method, at the end of the latest epoch
    seconds: list[float] = field(default_factory=list)  # of each finished round
    training_overhead: float = 0.0  # seconds that the method added to steps
    between_overhead: float = 0.0  # seconds of the method at the beginning and end of tasks
    memory_bytes: int = 0  # the most that the method remembered at the end of a task
    elapsed: float = 0.0  # seconds of former parts of the run
    round_elapsed: float = 0.0  # seconds of this round by former parts of the run

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        return cls(**{item.name: values[item.name] for item in fields(cls)})
