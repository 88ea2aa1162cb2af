"""Learning without forgetting: earlier heads keep their outputs on the present task's images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nostalgia.data.stream import Batch
from nostalgia.methods.base import Method, TaskContext
from nostalgia.methods.distillation import Distillation
from nostalgia.models.objective import Output
from nostalgia.options import option


@dataclass(frozen=True)
class LwfConfig:
    strength: float = option(1.0, "beta, of the distillation term.", low=0)
    temperature: float = option(2.0, "T, of both softmaxes.", above=0)


class Lwf(Method):
    """loss + beta sum_{u<t} T^2 KL(softmax(z_u^old / T) || softmax(z_u / T)) on the present batch.

    z_u^old are the outputs of the network at the end of the task before; heads of earlier tasks are frozen. Li and Hoiem
    2016, https://arxiv.org/abs/1606.09282. Remembers nothing between tasks: the network itself is the teacher.
    """

    name = "lwf"
    Config = LwfConfig
    strengths = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

    def __init__(self, config: LwfConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.all_heads = config.strength > 0
        self.distillation = Distillation(config.strength, config.temperature)

    def begin_task(self, task: TaskContext) -> None:
        self.distillation.begin(task)

    def loss(self, model: nn.Module, batch: Batch) -> Output:
        output = super().loss(model, batch)
        self.distillation.add(output, batch)
        return output

    def end_task(self, task: TaskContext) -> None:
        self.distillation.end()

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.distillation.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.distillation.load_state_dict(state["teacher"])
