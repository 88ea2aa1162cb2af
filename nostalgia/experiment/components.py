"""From a checked configuration to the components of a run: tasks, backbone, method."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from nostalgia.config.schema import Config
from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.data.sources import Source, load_source
from nostalgia.data.stream import Prepared, TaskLoader, View
from nostalgia.data.tasks import Task, TaskSpec, build_tasks, expand_specs
from nostalgia.errors import UsageError
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods.base import Method
from nostalgia.methods.loading import make_method, method_class
from nostalgia.models import Backbone, attach_lora, build_backbone, norm_statistics
from nostalgia.models.backbones import scope_parameters
from nostalgia.models.dropout import by_sample
from nostalgia.models.objective import Objective
from nostalgia.models.task_model import TaskModel
from nostalgia.parallel.accelerator import strategy
from nostalgia.parallel.coordination import agree, main_first
from nostalgia.training.optimizers import check_optimizer

PACKAGES = ("torch", "accelerate", "transformers", "peft", "hessian-eigenthings")


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


def task_loader(
    config: Config,
    accelerator: Accelerator,
    view: View,
    tasks: list[Task],
    train: bool,
    name: str | None = None,
    heads: Sequence[int] | None = None,
) -> TaskLoader:
    """Batches of one task, or of several together, for this rank."""
    dataset = config.dataset
    images = Prepared([t.train if train else t.val for t in tasks], [t.transform for t in tasks], view.resizing)
    return TaskLoader(
        images,
        view,
        name=name or tasks[0].name,
        per_device_batch_size=dataset.batch_size,
        train=train,
        accumulation_steps=config.train.gradient_accumulation_steps if train else 1,
        seed=config.experiment.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=dataset.num_workers,
        augment=augmentations(config, tasks),
        heads=heads,
    )


def augmentations(config: Config, tasks: Sequence[Task]) -> list[str]:
    """The augmentation policy of each task's training images."""
    chosen = config.dataset.augment
    return [task.augment if chosen == "default" else chosen for task in tasks]


def load_tasks(config: Config, accelerator: Accelerator) -> list[Task]:
    """The run's tasks with their data; rank 0 alone downloads, and first. A collective."""
    download, seed = config.dataset.download, config.experiment.seed
    return main_first(
        accelerator,
        lambda is_main: build_tasks(task_specs(config), source_loader(config, download and is_main), seed),
    )


def source_loader(config: Config, download: bool) -> Callable[[str], Source]:
    """Finds a data set by name, where the configuration says."""
    dataset = config.dataset
    return lambda name: load_source(
        name,
        root=dataset.root,
        val_fraction=dataset.val_fraction,
        entries=dataset.entries,
        download=download,
    )


def task_specs(config: Config) -> list[TaskSpec]:
    experiment = config.experiment
    return expand_specs(
        experiment.tasks,
        config.dataset.name,
        experiment.num_tasks,
        experiment.split,
        shared_head=experiment.head == "shared",
        class_order=experiment.class_order,
    )


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


def make_space(scope: dict[str, nn.Parameter], accelerator: Accelerator, dtype: torch.dtype) -> VectorSpace:
    """The vector space of the parameters in scope, spread as training will spread them."""
    if strategy(accelerator) == "fsdp2":
        shapes = [p.shape for p in scope.values()]
        return VectorSpace(list(scope), shapes, "sharded", dtype=dtype, device=accelerator.device)
    return VectorSpace.of(scope, dtype=dtype, device=accelerator.device)


def make_backbone(config: Config, download: bool = True) -> Backbone:
    model = config.model
    backbone = build_backbone(
        framework=model.framework,
        model_id=model.model_id,
        arch=model.arch,
        pretrained=model.pretrained,
        config=model.config,
        image_size=config.dataset.image_size,
        seed=config.experiment.seed,
        download=download,
    )
    if model.use_lora:
        lora = model.lora
        attach_lora(
            backbone,
            r=lora.r,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            seed=config.experiment.seed,
        )
        if lora.freeze_a:
            for name, parameter in backbone.named_parameters():
                if ".lora_A." in name:
                    parameter.requires_grad_(False)
    backbone.dropout = by_sample(backbone)
    return backbone


def complete_method(config: Config) -> None:
    """Put all options of the chosen method, checked, into ``config.method``, and what model.lora.merge=auto means with it.

    Raises UsageError for an option that the method does not have or allow, NotFoundError for a class that is not there.
    """
    from nostalgia.config.aliases import EVERY_METHOD

    given = dict(config.method)
    name = str(given.pop("name"))
    kind = method_class(name)
    known = {item.name for item in kind.Config.__dataclass_fields__.values()}
    every = {key: value for key, value in config.methods.get(EVERY_METHOD, {}).items() if key in known}
    method = make_method(name, {**given, **every}, config.experiment.seed)
    method.check(len(task_specs(config)), curvature_options(config))
    check_optimizer(config.train.optimizer, needs_metric=method.needs_metric)
    if config.model.use_lora and config.model.lora.merge == "task" and method.keeps_positions:
        raise UsageError(
            f"model.lora.merge=task with method={name}: it holds parameters to what they were, and adapters begun anew are "
            "others; use model.lora.merge=never"
        )
    options = method.config
    config.method, config.methods = {"name": name, **asdict(options)}, {}
    config.model.lora.merge = "task" if merges_adapters(config, method) else "never"


def merges_adapters(config: Config, method: Method) -> bool:
    """Adapters are added into the weights and begun anew before each later task."""
    merge = config.model.lora.merge
    wanted = merge == "task" or (merge == "auto" and method.prefers_merged_adapters)
    rounds = 1 if method.joint else len(task_specs(config))
    return config.model.use_lora and rounds > 1 and (wanted or method.restarts_adapters)


def chosen_method(config: Config) -> Method:
    """The run's method, made anew."""
    options: dict[str, Any] = {key: value for key, value in config.method.items() if key != "name"}
    return make_method(str(config.method["name"]), options, config.experiment.seed)


def curvature_options(config: Config) -> CurvatureOptions:
    options = config.curvature
    return CurvatureOptions(
        kind=options.kind,
        solver=options.solver,
        rows_per_sample=options.rows_per_sample,
        rows_budget_bytes=options.rows_budget_bytes,
        last_task=options.last_task,
        hvp=options.hvp,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        precision=options.precision,
        retain_graph={"true": True, "false": False}.get(options.retain_graph, "auto"),
        compile=options.compile,
        tol=options.tol,
        max_products=options.max_products,
        max_basis=options.max_basis,
        seed=config.experiment.seed,
    )


def versions() -> dict[str, str]:
    """Of the packages the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
