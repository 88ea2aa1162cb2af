"""From a checked configuration to the things a run is made of: folder, tasks, backbone, method."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from nostalgia.config import save
from nostalgia.config.schema import Config
from nostalgia.curvature.eigenspace import CurvatureOptions
from nostalgia.data.sources import load_source
from nostalgia.data.stream import Prepared, TaskLoader, View
from nostalgia.data.tasks import Task, build_tasks, expand_specs
from nostalgia.errors import UsageError
from nostalgia.linalg.vector_space import VectorSpace
from nostalgia.methods import Finetune, Joint, Method, Nostalgia
from nostalgia.models import Backbone, attach_lora, build_backbone, norm_statistics
from nostalgia.models.backbones import projected_parameters
from nostalgia.parallel.accelerator import strategy
from nostalgia.parallel.coordination import agree, main_first, on_main
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
        dataset, accelerator = self.config.dataset, self.accelerator
        images = Prepared(
            [t.train if train else t.val for t in tasks], [t.transform for t in tasks], self.view.image_size
        )
        augment = tasks[0].augment if dataset.augment == "default" else dataset.augment
        return TaskLoader(
            images,
            self.view,
            name=name or tasks[0].name,
            per_device_batch_size=dataset.batch_size,
            train=train,
            accumulation_steps=self.config.train.gradient_accumulation_steps if train else 1,
            seed=self.config.experiment.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=dataset.num_workers,
            augment=augment,
        )

    def epochs(self, task: Task) -> int:
        per_task = self.config.train.epochs_per_task
        return per_task[task.index - 1] if per_task is not None else self.config.train.epochs


def make_run_folder(config: Config, accelerator: Accelerator) -> Path:
    """A fresh ``<output_dir>/<date_time>/`` with config.yaml, and ``latest`` pointing at it."""
    return on_main(accelerator, lambda: _make_run_folder(config))


def _make_run_folder(config: Config) -> Path:
    parent = Path(config.experiment.output_dir).expanduser()
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder, number = parent / stamp, 1
        while folder.exists():
            number += 1
            folder = parent / f"{stamp}_{number}"
        folder.mkdir()
        save(config, folder / "config.yaml")
        link = parent / f".latest-{os.getpid()}"
        link.symlink_to(folder.name)
        os.replace(link, parent / "latest")
    except OSError as error:
        raise UsageError(
            f"experiment.output_dir={parent}: cannot be written ({error.strerror or error}); name another folder"
        ) from None
    return folder


def build_parts(config: Config, accelerator: Accelerator, precision: str) -> Parts:
    """Load data and weights and check what depends on them; an error on any rank is raised on all."""
    experiment, dataset = config.experiment, config.dataset

    def load_tasks(is_main: bool) -> list[Task]:
        specs = expand_specs(experiment.tasks, dataset.name, experiment.num_tasks, experiment.split)
        return build_tasks(
            specs,
            lambda name: load_source(
                name,
                root=dataset.root,
                val_fraction=dataset.val_fraction,
                entries=dataset.entries,
                download=dataset.download and is_main,
            ),
            experiment.seed,
        )

    tasks = main_first(accelerator, load_tasks)
    backbone = agree(accelerator, lambda: make_backbone(config))
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


def make_backbone(config: Config) -> Backbone:
    model = config.model
    backbone = build_backbone(
        framework=model.framework,
        model_id=model.model_id,
        arch=model.arch,
        pretrained=model.pretrained,
        config=model.config,
        image_size=config.dataset.image_size,
        seed=config.experiment.seed,
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
    )


def versions() -> dict[str, str]:
    """Of the packages the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
