"""EWC on the weights that LoRA adapters change: a diagonal Fisher matrix of B A, adapters begun anew for each task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nostalgia.curvature.fisher import LABELS, layer_fisher
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import MemoryPlan, Method, TaskContext
from nostalgia.models.adapters import Adapter, adapters_of, matrices, scalings
from nostalgia.models.task_model import TaskModel
from nostalgia.options import option
from nostalgia.parallel.modules import inner_module
from nostalgia.parallel.tensors import world_size


@dataclass(frozen=True)
class EwcLoraConfig:
    strength: float = option(100.0, "lam of lam/2 sum F (s B A)^2.", low=0)
    labels: str = option("sampled", "Of the Fisher matrix: sampled from the model, or true.", choices=LABELS)
    gamma: float = option(1.0, "F <- gamma F + F_t.", low=0, high=1)
    num_samples: int = option(512, "Training images of a finished task that its Fisher matrix is taken over.", low=1)


class EwcLora(Method):
    """lam/2 sum_l sum_ij F_lij D_lij^2, D_l = s_l B_l A_l the change of layer l's weight since the task began.

    F sums the tasks' diagonal Fisher matrices of the adapted weights. Before each task the adapters are merged into the
    weights and begun anew (B = 0), so that D counts from the end of the task before. Remembers o x i numbers a layer.
    """

    name = "ewc_lora"
    Config = EwcLoraConfig
    strengths = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
    restarts_adapters = True

    def __init__(self, config: EwcLoraConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.fisher: dict[str, Tensor] = {}  # layer -> (o, i)
        self.adapters: dict[str, Adapter] = {}
        self.scalings: dict[str, float] = {}

    def begin_task(self, task: TaskContext) -> None:
        self.adapters = adapters_of(inner_module(task.model).backbone)  # type: ignore[arg-type]
        self.scalings = scalings(inner_module(task.model).backbone)  # type: ignore[arg-type]

    @torch.no_grad()
    def gradients(self) -> None:
        if not self.fisher or self.config.strength == 0:
            return
        for name, (a, b) in matrices(self.adapters).items():
            scaling = self.scalings[name]
            force = self.config.strength * scaling**2 * self.fisher[name] * (b @ a)  # dR/d(B A)
            self.adapters[name].add_gradients(b.T @ force, force @ a.T)

    def end_task(self, task: TaskContext) -> None:
        if not task.wants_curvature:
            return
        assert isinstance(task.model, TaskModel)
        options = self.config
        found = layer_fisher(
            task.model,
            task.objective.forward_fn,
            task.samples(options.num_samples),
            list(adapters_of(task.model.backbone)),
            task.accelerator,
            labels=options.labels,
            seed=self.seed,
        )
        for name, fisher in found.items():
            before = self.fisher.get(name)
            self.fisher[name] = fisher if before is None else options.gamma * before + fisher

    def memory_plan(self, space: VectorSpace, num_tasks: int) -> MemoryPlan:
        """Of adapters whose A is trained too: that of a frozen one is in no ``space``."""
        sides = {name: shape for name, shape in zip(space.names, space.shapes, strict=True) if ".lora_" in name}
        inputs = {name: shape[1:].numel() for name, shape in sides.items() if ".lora_A." in name}
        numbers = sum(sides[name.replace(".lora_A.", ".lora_B.")][0] * i for name, i in inputs.items())
        text = f"an importance for each weight of {len(inputs)} layers" if inputs else ""
        return MemoryPlan(world_size() * numbers * space.dtype.itemsize, text)

    def bytes_remembered(self) -> int:
        return world_size() * sum(f.numel() * f.element_size() for f in self.fisher.values())

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self.fisher}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.fisher = dict(state["fisher"])
