"""What the run that ``--debug`` cuts short would be: its configuration and size, for the estimate of its cost."""

from __future__ import annotations

from pathlib import Path

from rich.panel import Panel

from nostalgia.config import Request, parse
from nostalgia.experiment.setup import Parts
from nostalgia.reporting.console import RunInfo
from nostalgia.reporting.cost import Measured, TaskLoad, Workload, cost_panel, estimate
from nostalgia.reporting.run_folder import read_run


def cost_of_full_run(request: Request, parts: Parts, info: RunInfo, folder: Path) -> Panel:
    """The panel that a ``--debug`` run in ``folder`` ends with; ``info`` is its own, with the same model and batch."""
    full = parse([word for word in request.argv if word != "--debug"]).config
    curvature, memory = parts.method.needs_curvature, parts.memory
    k_max = full.nostalgia.k_max or 4 * full.nostalgia.top_k
    columns = min(k_max, full.nostalgia.top_k * len(parts.tasks)) if memory.merge == "union" else full.nostalgia.top_k
    heads = sum(len(task.classes) * (parts.backbone.feature_dim + 1) for task in parts.tasks)
    per_task = None if parts.method.joint else full.train.epochs_per_task
    per_task = per_task or [full.train.epochs] * len(parts.tasks)
    smallest = min(min(len(task.train) for task in parts.tasks), parts.config.nostalgia.num_samples)
    work = Workload(
        tasks=[TaskLoad(len(t.train), len(t.val), e) for t, e in zip(parts.tasks, per_task, strict=True)],
        joint=parts.method.joint,
        global_batch_size=info.global_batch_size,
        head_warmup_epochs=full.train.head_warmup_epochs,
        top_k=full.nostalgia.top_k if curvature else 0,
        num_samples=full.nostalgia.num_samples,
        trained_parameters=info.trainable_parameters + heads,
        optimizer_states=2 if full.train.optimizer == "adamw" else 1,
        projected_parameters=info.projected_parameters,
        basis_columns=columns if curvature else 0,
        basis_bytes=columns * info.basis_bytes // info.basis_columns if info.basis_columns else 0,
        devices=info.devices,
    )
    return cost_panel(work, estimate(work, Measured.of(read_run(folder), smallest)))
