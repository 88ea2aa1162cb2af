"""What a run is, for its start panel."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from nostalgia.config import Request
from nostalgia.experiment.setup import Parts
from nostalgia.models.backbones import has_adapters
from nostalgia.parallel.accelerator import strategy
from nostalgia.reporting.console import RunInfo, TaskInfo


def run_info(parts: Parts, request: Request, folder: Path) -> RunInfo:
    """What the start panel shows."""
    config, accelerator = parts.config, parts.accelerator
    parameters = list(parts.backbone.parameters())
    projects = parts.method.needs_curvature
    chosen = config.nostalgia.project_params
    if chosen == "auto":
        chosen = "lora-only" if has_adapters(parts.backbone) else "backbone"
    tasks = len(parts.tasks)
    memory = parts.memory
    columns = min(memory.k_max, tasks * memory.k) if memory.merge == "union" else memory.k
    itemsize = 2 if config.nostalgia.basis_dtype == "bfloat16" else parts.space.zeros(0).element_size()
    placement = memory.place(parts.space)
    local = parts.space.size if placement.replicated else parts.space.local_size
    return RunInfo(
        method=parts.method.name,
        seed=config.experiment.seed,
        tasks=[
            TaskInfo(
                name=t.name, num_classes=len(t.classes), num_train=len(t.train), num_val=len(t.val), source=t.source
            )
            for t in parts.tasks
        ],
        model=config.model.name,
        total_parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        projected_parameters=parts.space.size if projects else 0,
        projected=chosen if projects else "",
        devices=f"{accelerator.num_processes} x {device_name(accelerator)}",
        strategy=strategy(accelerator),
        precision=parts.precision,
        per_device_batch_size=config.dataset.batch_size,
        accumulation_steps=config.train.gradient_accumulation_steps,
        global_batch_size=config.dataset.batch_size
        * config.train.gradient_accumulation_steps
        * accelerator.num_processes,
        epochs=[parts.epochs(t) for t in parts.tasks],
        run_dir=folder,
        suite=request.suite,
        basis_columns=columns if projects else 0,
        basis_bytes=columns * local * itemsize if projects else 0,
        basis_placement=str(placement),
    )


def device_name(accelerator: Accelerator) -> str:
    return "cpu" if accelerator.device.type == "cpu" else torch.cuda.get_device_name(accelerator.device)
