"""What a run is, for its start panel."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from nostalgia.config import Config, Request
from nostalgia.experiment.components import Components
from nostalgia.experiment.scale import memory_plan
from nostalgia.logging.console import RunInfo, TaskInfo
from nostalgia.models.backbones import has_adapters
from nostalgia.parallel.accelerator import ranks_note, strategy
from nostalgia.training.loop import WARMUP_SHARE


def run_info(run: Components, request: Request, folder: Path) -> RunInfo:
    """What the start panel shows."""
    config, accelerator = run.config, run.accelerator
    parameters = list(run.backbone.parameters())
    scope = config.model.scope
    if scope == "auto":
        scope = "lora-only" if has_adapters(run.backbone) else "backbone"
    plan = memory_plan(run, run.method)
    return RunInfo(
        method=run.method.name,
        seed=config.experiment.seed,
        tasks=[
            TaskInfo(
                name=t.name, num_classes=len(t.classes), num_train=len(t.train), num_val=len(t.val), source=t.source
            )
            for t in run.tasks
        ],
        model=config.model.name,
        total_parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        scope_parameters=run.space.size,
        scope=scope,
        devices=f"{accelerator.num_processes} x {device_name(accelerator)}",
        strategy=strategy(accelerator),
        precision=run.precision,
        per_device_batch_size=config.dataset.batch_size,
        accumulation_steps=config.train.gradient_accumulation_steps,
        global_batch_size=run.global_batch_size,
        epochs=[config.train.epochs] if run.method.joint else [run.epochs(t) for t in run.tasks],
        run_dir=folder,
        suite=request.suite,
        memory_bytes=plan.bytes,
        memory=plan.text,
        merges_adapters=run.merges_adapters,
    )


def run_notes(config: Config, accelerator: Accelerator) -> list[str]:
    """What a run does otherwise than its configuration says, or its launch lets expect, one line each."""
    train, notes = config.train, [note] if (note := ranks_note(accelerator)) else []
    shortest = min([train.epochs] if train.epochs_per_task is None else train.epochs_per_task)
    if train.warmup_epochs > WARMUP_SHARE * shortest:
        notes.append(
            f"train.warmup_epochs={train.warmup_epochs:g} is cut to {WARMUP_SHARE * shortest:g} of {shortest} epochs, "
            f"{WARMUP_SHARE:.0%} of a task"
        )
    return notes


def check_figures(config: Config) -> None:
    """Raise UsageError or NotFoundError for figures of the user's own that are not there: before training, not after it."""
    if config.logger.figures:
        from nostalgia.analysis.figures_own import load_figures  # matplotlib: most runs do not need it yet

        load_figures(config.logger.figures, (), "logger.figures=")


def device_name(accelerator: Accelerator) -> str:
    return "cpu" if accelerator.device.type == "cpu" else torch.cuda.get_device_name(accelerator.device)
