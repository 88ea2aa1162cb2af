"""What a finished run hands out: its model, in ``export/``, for other tools and for `nostalgia.evaluate`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from nostalgia.data.tasks import head_classes
from nostalgia.experiment.components import Components
from nostalgia.logging.results import RunResults
from nostalgia.models.export import export
from nostalgia.models.model_card import TaskCard

EXPORT = "export"


def export_run(run_dir: Path, run: Components, results: RunResults, argv: Sequence[str]) -> Path:
    """Write ``run_dir/export``. One rank calls it, with whole parameters; OSError where it cannot be written."""
    classes = head_classes(run.tasks)
    cards = [
        TaskCard(task.name, classes[task.head], accuracy, results.accuracy_matrix[i][i], task.transform)
        for i, (task, accuracy) in enumerate(zip(run.tasks, results.final_accuracies(), strict=True))
    ]
    heads: dict[str, nn.Linear] = {}
    for task in run.tasks:
        head = run.heads[task.head]
        assert isinstance(head, nn.Linear)
        heads[task.name] = head
    model = run.config.model
    # Tasks without statistics of their own have the network's.
    statistics = {task.name: own for task in run.tasks if (own := run.statistics_of(task))}
    return export(
        run_dir / EXPORT,
        backbone=run.backbone,
        heads=heads,
        tasks=cards,
        command=shlex.join(["python", "-m", "nostalgia.train", *argv]),
        method=results.method,
        # Merged adapters belong to the network of backbone/, no longer to the weights that the run began with.
        model_id=model.model_id if model.pretrained and not run.merges_adapters else None,
        norm_statistics=statistics,
    )
