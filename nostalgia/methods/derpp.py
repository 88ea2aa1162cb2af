"""Dark experience replay++: exemplars keep their labels and the outputs they had when they were stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nostalgia.data.exemplars import ExemplarLoader
from nostalgia.data.stream import Batch
from nostalgia.methods.base import TaskContext
from nostalgia.methods.er import ExperienceReplay, ReplayConfig
from nostalgia.models.objective import Output
from nostalgia.options import option


@dataclass(frozen=True)
class DerppConfig(ReplayConfig):
    alpha: float = option(0.3, "Weight of |z - z_stored|^2 of an exemplar.", low=0)


class DarkExperienceReplay(ExperienceReplay):
    """er, plus alpha |z - z_stored|^2 (mean over the outputs of the exemplar's own head).

    Buzzega et al. 2020, https://arxiv.org/abs/2004.07211. Outputs are stored at the end of a task, without augmentation, in
    evaluation mode; the paper stores them while it trains, and draws other exemplars for each of the two terms. Remembers
    exemplars and their outputs within ``budget_bytes``.
    """

    name = "derpp"
    Config = DerppConfig

    def __init__(self, config: DerppConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.outputs: dict[int, Tensor] = {}  # task -> (M, classes)

    @property
    def replays(self) -> bool:
        return len(self.memory) > 0 and (self.config.strength > 0 or self.config.alpha > 0)

    def replayed(self, exemplars: ExemplarLoader, model: nn.Module, batch: Batch) -> tuple[Output, Batch]:
        output, old = super().replayed(exemplars, model, batch)
        if self.config.alpha > 0:
            output.loss = output.loss + self.config.alpha * self._distance(exemplars, output, batch, old)
        return output, old

    def _distance(self, exemplars: ExemplarLoader, output: Output, batch: Batch, old: Batch) -> Tensor:
        """Sum over the exemplars, by the weights of the images they stand beside."""
        task_of = exemplars.images.tasks[old.indices.cpu()]  # (B,) from 0
        total = output.loss.new_zeros(())
        for number in task_of.unique().tolist():
            rows = (task_of == number).nonzero().flatten()
            stored = self.outputs[number + 1].to(old.images.device)
            own = (old.indices.cpu()[rows] - exemplars.images.starts[number]).tolist()
            place = {index: i for i, index in enumerate(self.memory.per_task[number + 1])}
            targets = stored[[place[index] for index in own]]
            rows = rows.to(old.images.device)
            now = output.logits[int(old.tasks[rows[0]])][len(batch) :][rows][:, : targets.shape[1]]
            distance = (now.to(targets.dtype) - targets).square().mean(dim=1)
            total = total + (distance * batch.weights[rows]).sum()
        return total

    @torch.no_grad()
    def end_task(self, task: TaskContext) -> None:
        self.exemplars = None
        outputs = 4 * len(task.tasks[-1].classes)
        if self.config.budget_bytes < task.image_bytes + outputs:
            return
        self.memory.add(task, outputs)
        self.outputs = {number: kept[: len(self.memory.per_task[number])] for number, kept in self.outputs.items()}
        own = self.memory.per_task[task.index]
        loader, modes = task.loader([(task.index, index) for index in own]), [m.training for m in task.model.modules()]
        task.model.eval()
        parts = []
        for positions in torch.arange(len(own)).split(64):
            weights = torch.ones(len(positions), device=task.accelerator.device)
            parts.append(task.model(loader.take(positions, weights).images)[task.head].float())
        for module, mode in zip(task.model.modules(), modes, strict=True):
            module.training = mode
        if parts:
            self.outputs[task.index] = torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "outputs": {str(task): kept for task, kept in self.outputs.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.outputs = {int(task): kept for task, kept in state["outputs"].items()}
