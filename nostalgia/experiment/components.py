"""The components of a run, made from a checked configuration: tasks, backbone, method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn

from nostalgia.config.schema import Config
from nostalgia.data.stream import TaskLoader, View
from nostalgia.data.tasks import Task
from nostalgia.experiment.method_choice import chosen_method, merges_adapters
from nostalgia.experiment.network import make_backbone, make_space
from nostalgia.experiment.task_data import augmentations, load_tasks, task_loader
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import Method
from nostalgia.models import Backbone, norm_statistics, scope_parameters
from nostalgia.models.objective import Objective
from nostalgia.models.task_model import TaskModel
from nostalgia.parallel.accelerator import strategy
from nostalgia.parallel.coordination import agree
from nostalgia.training.optimizers import check_optimizer


@dataclass
class Components:
    """What a run works on. ``heads`` are by name, in the order of their first tasks; they grow with the tasks.

    ``norm_statistics`` are those each task ended with; ``scope`` names the parameters that methods protect.
    """

    config: Config
    accelerator: Accelerator
    precision: str
    tasks: list[Task]
    backbone: Backbone
    method: Method
    space: VectorSpace
    view: View
    scope: tuple[str, ...]
    objective: Objective
    heads: dict[str, nn.Module] = field(default_factory=dict)
    norm_statistics: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def loader(
        self, tasks: list[Task], train: bool, name: str | None = None, heads: Sequence[int] | None = None
    ) -> TaskLoader:
        """Batches of one task, or of several together (joint training)."""
        return task_loader(self.config, self.accelerator, self.view, tasks, train, name, heads)

    def augmentations(self, tasks: Sequence[Task]) -> list[str]:
        return augmentations(self.config, tasks)

    @property
    def merges_adapters(self) -> bool:
        return merges_adapters(self.config, self.method)

    def epochs(self, task: Task) -> int:
        per_task = self.config.train.epochs_per_task
        return per_task[task.index - 1] if per_task is not None else self.config.train.epochs

    def statistics_of(self, task: Task) -> dict[str, torch.Tensor]:
        """Batch-norm statistics of a trained task's own; empty where it has none, or where its head is other tasks' too: which
        of them an image is of is not known then."""
        alone = [one.head for one in self.tasks[: len(self.norm_statistics)]].count(task.head) == 1
        own = alone and self.config.model.norm_statistics == "per_task"
        return self.norm_statistics[task.index - 1] if own else {}

    def scope_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters in scope of the backbone as it is now, by name."""
        available = scope_parameters(self.backbone, self.config.model.scope)
        return {name: available[name] for name in self.scope}

    def model(self, heads: Sequence[str] | None = None) -> TaskModel:
        """The network as it stands with ``heads``, by name; all so far by default."""
        return TaskModel(self.backbone, list(self.heads.values()) if heads is None else [self.heads[h] for h in heads])

    def take_trained(self, model: TaskModel, heads: Sequence[str], count: int) -> None:
        """Go on with what training has left of the backbone and of ``heads``, for the next ``count`` tasks."""
        self.backbone = model.backbone  # type: ignore[assignment]
        norm_statistics.average_over_ranks(self.backbone)
        self.heads.update(zip(heads, model.heads, strict=True))
        self.norm_statistics += [norm_statistics.capture(self.backbone)] * count

    def capture_statistics(self, count: int) -> None:
        """Take batch-norm statistics of the last ``count`` tasks anew."""
        self.norm_statistics[-count:] = [norm_statistics.capture(self.backbone)] * count

    @property
    def global_batch_size(self) -> int:
        config = self.config
        per_rank = config.dataset.batch_size * config.train.gradient_accumulation_steps
        return per_rank * self.accelerator.num_processes


def build_components(
    config: Config,
    accelerator: Accelerator,
    precision: str,
    *,
    tasks: list[Task] | None = None,
    download_weights: bool = True,
) -> Components:
    """Load data and weights and check what depends on them; an error on any rank is raised on all.

    ``tasks`` are those of a dry run, which has looked for them already.
    """
    check_optimizer(config.train.optimizer, sharded=strategy(accelerator) == "fsdp2")
    if tasks is None:
        tasks = load_tasks(config, accelerator)
    method = agree(accelerator, lambda: chosen_method(config))
    backbone = agree(accelerator, lambda: make_backbone(config, download_weights))
    dtype = torch.float64 if precision == "64" else torch.float32
    backbone.to(device=accelerator.device, dtype=dtype)
    if config.model.norm_statistics == "frozen":
        norm_statistics.freeze(backbone)
    elif (
        strategy(accelerator) == "ddp"
        and accelerator.device.type == "cuda"
        and norm_statistics.has_batch_norm(backbone)
    ):
        norm_statistics.synchronise(backbone)
    elif config.dataset.batch_size == 1 and not method.frozen_backbone:
        agree(accelerator, lambda: backbone.check_batch(1))
    scope = scope_parameters(backbone, config.model.scope)
    return Components(
        config=config,
        accelerator=accelerator,
        precision=precision,
        tasks=tasks,
        backbone=backbone,
        method=method,
        space=make_space(scope, accelerator, dtype),
        view=View(backbone.resizing, tuple(backbone.mean), tuple(backbone.std), accelerator.device, dtype),
        scope=tuple(scope),
        objective=Objective(config.train.label_smoothing),
    )
