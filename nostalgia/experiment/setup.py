"""From a checked configuration to the things a run is made of: folder, tasks, backbone, method."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from accelerate import Accelerator
from torch import nn

from nostalgia.config.schema import Config
from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.data.sources import Source, load_source
from nostalgia.data.stream import Prepared, TaskLoader, View
from nostalgia.data.tasks import Task, TaskSpec, build_tasks, expand_specs
from nostalgia.errors import UsageError
from nostalgia.experiment.checkpointing import Schedule
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods import Finetune, Joint, Method, Nostalgia
from nostalgia.methods.loading import load_method
from nostalgia.models import Backbone, attach_lora, build_backbone, norm_statistics
from nostalgia.models.backbones import projected_parameters
from nostalgia.parallel.accelerator import strategy
from nostalgia.parallel.coordination import agree, main_first
from nostalgia.projection import CurvatureMemory
from nostalgia.training.loop import Optimization

PACKAGES = ("torch", "accelerate", "transformers", "peft", "hessian-eigenthings")


@dataclass
class Parts:
    """What a run works on. ``heads`` grow by one a task; ``norm_statistics`` are those each task ended with."""

    config: Config
    accelerator: Accelerator
    precision: str
    tasks: list[Task]
    backbone: Backbone
    method: Method
    memory: CurvatureMemory
    space: VectorSpace
    view: View
    projected: tuple[str, ...]
    heads: list[nn.Module] = field(default_factory=list)
    norm_statistics: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def loader(self, tasks: list[Task], train: bool, name: str | None = None) -> TaskLoader:
        """Batches of one task, or of several together (joint training)."""
        return task_loader(self.config, self.accelerator, self.view, tasks, train, name)

    def epochs(self, task: Task) -> int:
        per_task = self.config.train.epochs_per_task
        return per_task[task.index - 1] if per_task is not None else self.config.train.epochs


def task_loader(
    config: Config, accelerator: Accelerator, view: View, tasks: list[Task], train: bool, name: str | None = None
) -> TaskLoader:
    """Batches of one task, or of several together, for this rank."""
    dataset = config.dataset
    images = Prepared([t.train if train else t.val for t in tasks], [t.transform for t in tasks], view.image_size)
    augment = [t.augment if dataset.augment == "default" else dataset.augment for t in tasks]
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
        augment=augment,
    )


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
    return expand_specs(experiment.tasks, config.dataset.name, experiment.num_tasks, experiment.split)


def build_parts(
    config: Config,
    accelerator: Accelerator,
    precision: str,
    *,
    tasks: list[Task] | None = None,
    download_weights: bool = True,
) -> Parts:
    """Load data and weights and check what depends on them; an error on any rank is raised on all.

    ``tasks`` are those of a dry run, which has looked for them already.
    """
    if tasks is None:
        tasks = load_tasks(config, accelerator)
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
    projected = projected_parameters(backbone, config.nostalgia.project_params)
    placement = "sharded" if strategy(accelerator) == "fsdp2" else "auto"
    if placement == "sharded":
        space = VectorSpace(
            list(projected), [p.shape for p in projected.values()], "sharded", dtype=dtype, device=accelerator.device
        )
    else:
        space = VectorSpace.of(projected, dtype=dtype, device=accelerator.device)
    method, memory = make_method(config, len(tasks))
    if method.needs_curvature and config.nostalgia.top_k > space.size:
        raise UsageError(
            f"nostalgia.top_k={config.nostalgia.top_k}: allowed 1 to {space.size}, the number of projected parameters"
        )
    view = View(backbone.image_size, tuple(backbone.mean), tuple(backbone.std), accelerator.device, dtype)
    return Parts(
        config=config,
        accelerator=accelerator,
        precision=precision,
        tasks=tasks,
        backbone=backbone,
        method=method,
        memory=memory,
        space=space,
        view=view,
        projected=tuple(projected),
    )


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
    return backbone


def make_method(config: Config, num_tasks: int) -> tuple[Method, CurvatureMemory]:
    """The method, and the memory it writes (empty for methods without one)."""
    options = config.nostalgia
    k_max = 4 * options.top_k if options.k_max is None else options.k_max
    memory = CurvatureMemory(
        options.top_k,
        options.merge,
        min(k_max, num_tasks * options.top_k),  # so that `auto` counts no columns that never come
        placement=options.basis_placement,
        dtype=torch.bfloat16 if options.basis_dtype == "bfloat16" else None,
        budget_bytes=None if options.basis_memory_gb is None else options.basis_memory_gb * 2**30,
    )
    if ":" in config.method.name:
        return load_method(config.method.name, memory), memory
    if config.method.name == "joint":
        return Joint(), memory
    if config.method.name == "finetune" or not options.enabled:
        return Finetune(), memory
    return Nostalgia(memory, options.project, options.projection_start_task), memory


def optimization(config: Config, epochs: int, *, head_only: bool = False) -> Optimization:
    """How a phase is optimised; the head's warm-up has a constant rate from the start."""
    train = config.train
    return Optimization(
        epochs=epochs,
        optimizer=train.optimizer,
        lr=(train.head_warmup_lr or train.lr) if head_only else train.lr,
        weight_decay=train.weight_decay,
        betas=(train.betas[0], train.betas[1]),
        momentum=train.momentum,
        scheduler="constant" if head_only else train.scheduler,
        warmup_epochs=0 if head_only else train.warmup_epochs,
        max_grad_norm=train.max_grad_norm,
        label_smoothing=train.label_smoothing,
    )


def checkpoint_schedule(config: Config) -> Schedule:
    train = config.train
    return Schedule(
        every_steps=train.checkpoint_every_steps,
        every_epochs=train.checkpoint_every_epochs,
        every_products=config.nostalgia.checkpoint_every_n_products,
        keep=train.keep_checkpoints,
        on_failure=train.on_checkpoint_failure,
    )


def curvature_options(config: Config) -> CurvatureOptions:
    options = config.nostalgia
    return CurvatureOptions(
        top_k=options.top_k,
        kind=options.curvature,
        method=options.hvp,
        precision=options.precision,
        retain_graph={"true": True, "false": False}.get(options.retain_graph, "auto"),
        compile=options.compile,
        tol=options.tol,
        max_products=options.max_products,
        max_basis=options.max_basis,
        seed=config.experiment.seed,
        label_smoothing=config.train.label_smoothing,
    )


def versions() -> dict[str, str]:
    """Of the packages the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
