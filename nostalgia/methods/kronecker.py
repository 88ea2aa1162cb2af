"""Kronecker-factored curvature as a penalty in weight space, with no eigensolve; optionally anchored outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.curvature.kronecker import KroneckerFactors
from nostalgia.data.stream import Batch
from nostalgia.methods.base import Method, TaskContext
from nostalgia.methods.distillation import Distillation
from nostalgia.methods.path import PATH_HELP, PathStep, check_path
from nostalgia.methods.tail import TailOptions, make_tail
from nostalgia.models.objective import Output
from nostalgia.options import option


@dataclass(frozen=True)
class KroneckerConfig:
    strength: float = option(10.0, "lam of lam/2 sum tr(G D A D^T).", low=0)
    num_samples: int = option(256, "Training images of a finished task that its factors are taken over.", low=1)
    draws: int = option(4, "Output cotangents a sample.", low=1)
    temperature: float = option(4.0, "Of the softmax whose Gauss-Newton matrix is the output metric.", above=0)
    budget_bytes: int | None = option(
        2**28, "Factors on a rank, beyond which all tasks become one pair a layer; null: never.", low=0
    )
    anchor: float = option(0.0, "Strength of the distillation of earlier tasks' outputs; 0: none.", low=0)
    anchor_temperature: float = option(2.0, "Of the distillation's softmaxes.", above=0)
    path: float | str = option(1.0, PATH_HELP, above=0, high=1)


class Kronecker(Method):
    """lam/2 sum_t sum_l tr(G_tl D_l A_tl D_l^T) + anchor sum_{u<t} T^2 KL(softmax(z_u^old / T) || softmax(z_u / T)).

    D_l is the change of layer l's weight since the end of the last task (s (B A - B* A*) of an adapter), A_t and G_t the
    Kronecker factors of a finished task's Gauss-Newton matrix (Martens and Grosse 2015; as a penalty: Ritter et al. 2018,
    https://arxiv.org/abs/1805.07810), the second term learning without forgetting's. Remembers i^2 + o^2 numbers a layer
    and task.
    """

    name = "kronecker"
    Config = KroneckerConfig
    strengths = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
    prefers_merged_adapters = True

    def __init__(self, config: KroneckerConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.tail = make_tail(
            TailOptions(
                kind="kronecker",
                strength=config.strength,
                num_samples=config.num_samples,
                draws=config.draws,
                temperature=config.temperature,
                budget_bytes=config.budget_bytes,
            )
        )
        self.path = PathStep(config.path)
        self.all_heads = config.anchor > 0
        self.distillation = Distillation(config.anchor, config.anchor_temperature)

    def check(self, num_tasks: int, curvature: CurvatureOptions) -> None:
        check_path(self.config.path, self.tail)

    def begin_task(self, task: TaskContext) -> None:
        self.tail.begin(task)
        self.path.begin(task)
        self.distillation.begin(task)

    def loss(self, model: nn.Module, batch: Batch) -> Output:
        output = super().loss(model, batch)
        self.distillation.add(output, batch)
        return output

    def gradients(self) -> None:
        self.tail.add_gradients(self.task)

    def end_task(self, task: TaskContext) -> None:
        self.distillation.end()
        self.path.end(task, self.config.num_samples, self.tail)
        if task.wants_curvature:
            self.tail.end(task)

    def bytes_remembered(self) -> int:
        return self.tail.bytes()

    def factors(self) -> KroneckerFactors | None:
        return self.tail.factors

    def note(self) -> str:
        return "; ".join(note for note in (self.path.note, self.tail.note) if note)

    def state_dict(self) -> dict[str, Any]:
        return {
            "tail": self.tail.state_dict(),
            "path": self.path.state_dict(),
            "teacher": self.distillation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tail.load_state_dict(state["tail"])
        self.path.load_state_dict(state["path"])
        self.distillation.load_state_dict(state["teacher"])
