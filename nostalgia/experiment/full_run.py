"""What the run that ``--debug`` cuts short would be: its configuration and size, for the estimate of its cost."""

from __future__ import annotations

import math
from pathlib import Path

from rich.panel import Panel

from nostalgia.analysis.cost import Measured, TaskLoad, Workload, cost_panel, estimate
from nostalgia.analysis.run_folder import read_run
from nostalgia.config import Config, Request, parse
from nostalgia.experiment.components import Components
from nostalgia.experiment.method_choice import (
    chosen_method,
    complete_method,
    curvature_options,
    merges_adapters,
)
from nostalgia.experiment.scale import memory_plan
from nostalgia.logging.console import RunInfo
from nostalgia.methods.base import MemoryPlan
from nostalgia.models.adapters import adapted_weights
from nostalgia.training.optimizers import OPTIMIZERS


def full_run_of(request: Request, run: Components) -> tuple[Config, MemoryPlan]:
    """The configuration without ``--debug``, and what its method would remember; a collective."""
    full = parse([word for word in request.argv if word != "--debug"]).config
    complete_method(full)
    return full, memory_plan(run, chosen_method(full))


def cost_of_full_run(full: Config, plan: MemoryPlan, run: Components, info: RunInfo, folder: Path) -> Panel:
    """The panel that a ``--debug`` run in ``folder`` ends with; ``info`` is its own, with the same model."""
    done, joint = read_run(folder), run.method.joint
    heads = sum(len(task.classes) * (run.backbone.feature_dim + 1) for task in run.tasks)
    per_task = None if joint else full.train.epochs_per_task
    per_task = per_task or [full.train.epochs] * len(run.tasks)
    smallest = min(min(len(task.train) for task in run.tasks), run.config.curvature.num_samples)
    merged = adapted_weights(run.backbone).values() if merges_adapters(full, chosen_method(full)) else ()
    rows = curvature_options(full).takes_rows(run.space)
    batch = full.dataset.batch_size * run.accelerator.num_processes
    evaluated = (full.train.max_eval_batches or math.inf) * batch
    work = Workload(
        tasks=[
            TaskLoad(len(t.train), int(min(len(t.val), evaluated)), e) for t, e in zip(run.tasks, per_task, strict=True)
        ],
        joint=joint,
        global_batch_size=batch * full.train.gradient_accumulation_steps,
        head_warmup_epochs=full.train.head_warmup_epochs,
        top_k=full.method.get("top_k", full.analysis.top_k) if done.curvature and not rows else 0,
        num_samples=full.curvature.num_samples,
        trained_parameters=info.trainable_parameters + heads,
        merged_weights=sum(weight.numel() for weight in merged),
        optimizer_states=OPTIMIZERS[full.train.optimizer].states,
        memory_bytes=plan.bytes,
        memory=plan.text,
        devices=info.devices,
        last_task=full.curvature.last_task,
        max_steps_per_epoch=full.train.max_steps_per_epoch,
    )
    return cost_panel(work, estimate(work, Measured.of(done, smallest)))
