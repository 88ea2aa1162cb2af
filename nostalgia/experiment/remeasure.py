"""Measures a finished run from the model it has exported: its own tasks, or a folder of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from nostalgia.data.stream import View
from nostalgia.data.tasks import Task
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.evaluation.per_class import evaluate_classes
from nostalgia.experiment.data_check import check_data
from nostalgia.experiment.exporting import EXPORT
from nostalgia.experiment.task_data import folder_task, load_tasks, task_loader
from nostalgia.logging.class_table import Measured, print_measured
from nostalgia.logging.results import read_results
from nostalgia.logging.streams import make_console
from nostalgia.models import norm_statistics
from nostalgia.models.exported import load_classes, load_export
from nostalgia.parallel.coordination import agree, on_main
from nostalgia.utils.files import write_json

if TYPE_CHECKING:
    from nostalgia.evaluate import EvaluationRequest

Classes = dict[str, list[str]]  # what the outputs of each task's head stand for


def remeasure(request: EvaluationRequest, accelerator: Accelerator, precision: str) -> None:
    """Measure, print and write what ``request`` asks for; a collective."""
    experiment = request.config.experiment
    set_seed(experiment.seed, device_specific=True, deterministic=experiment.deterministic)
    classes = agree(accelerator, lambda: load_classes(request.run_dir / EXPORT))
    chosen = agree(accelerator, lambda: _chosen(request, list(classes)))
    before = agree(accelerator, lambda: _run_accuracies(request))
    tasks = _tasks(request, classes, chosen, accelerator)
    measured = _measure(request, tasks, classes, before, accelerator, precision)
    if accelerator.is_main_process:
        _report(request, measured, accelerator, precision)


def _chosen(request: EvaluationRequest, names: list[str]) -> list[str]:
    """The tasks to measure."""
    wanted = request.task
    if wanted is None:
        if request.data is not None and len(names) > 1:
            raise UsageError(f"--data {request.data} needs --task NAME: one of {', '.join(names)}")
        return names
    if wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return [names[int(wanted) - 1]]
    if wanted not in names:
        raise UsageError(f"--task {wanted}: the run has {', '.join(names)} (or 1 to {len(names)})")
    return [wanted]


def _run_accuracies(request: EvaluationRequest) -> dict[str, float | None]:
    """What the run's results say of each task at its end; nothing where other images are measured."""
    if request.data is not None:
        return {}
    results = read_results(request.run_dir / "results")
    return dict(zip(results.tasks, results.final_accuracies(), strict=True))


def _tasks(request: EvaluationRequest, classes: Classes, chosen: list[str], accelerator: Accelerator) -> list[Task]:
    """The chosen tasks, labelled by the outputs of their heads: the run's own, or with the images of a folder."""
    if request.data is not None:
        folder, name = request.data, chosen[0]
        return [agree(accelerator, lambda: folder_task(request.config, folder, name, classes))]

    def check(tasks: list[Task]) -> list[Task]:
        for task in tasks:
            if list(task.classes) != classes.get(task.name, [])[: len(task.classes)]:
                raise NotFoundError(
                    f"{task.source}: its classes are not those that {task.name} was trained with; put the data back "
                    f"that {request.run_dir} had, or measure a folder with --data"
                )
        return tasks

    tasks = load_tasks(request.config, accelerator)
    on_main(
        accelerator,
        lambda: check_data(
            request.run_dir, tasks, f"measure a folder with --data, or remove {request.run_dir}/data.json"
        ),
    )
    return [task for task in agree(accelerator, lambda: check(tasks)) if task.name in chosen]


def _measure(
    request: EvaluationRequest,
    tasks: list[Task],
    classes: Classes,
    before: dict[str, float | None],
    accelerator: Accelerator,
    precision: str,
) -> list[Measured]:
    """Each task with its own head and, where the run kept them, its own batch-norm statistics."""
    config, export = request.config, request.run_dir / EXPORT
    framework, settings = config.model.framework, config.model.config
    exported = agree(accelerator, lambda: load_export(export, framework=framework, config=settings))
    backbone = exported.backbone
    dtype = torch.float64 if precision == "64" else torch.float32
    backbone.to(device=accelerator.device, dtype=dtype)
    view = View(backbone.resizing, tuple(backbone.mean), tuple(backbone.std), accelerator.device, dtype)
    measured = []
    for task in tasks:
        loader = task_loader(config, accelerator, view, [task], train=False)
        head = exported.heads[task.name].to(device=accelerator.device, dtype=dtype)
        with norm_statistics.using(backbone, exported.norm_statistics.get(task.name)):
            limit = config.train.max_eval_batches
            scores = evaluate_classes(backbone, head, classes[task.name], loader, accelerator, limit)
        measured.append(Measured(task.name, scores, before.get(task.name)))
    return measured


def _report(request: EvaluationRequest, measured: list[Measured], accelerator: Accelerator, precision: str) -> None:
    console = make_console()
    print_measured(console, measured)
    compared = [one for one in measured if one.run_accuracy is not None]
    different = [one for one in compared if one.run_accuracy != one.scores.accuracy]
    file = request.output or request.run_dir / "results" / "evaluation.json"
    found = {
        "run": str(request.run_dir),
        "data": None if request.data is None else str(request.data),
        "acc": sum(one.scores.accuracy for one in measured) / len(measured),
        "same_as_run": not different if compared else None,
        "device": accelerator.device.type,
        "precision": precision,
        "world_size": accelerator.num_processes,
        "tasks": [one.to_json() for one in measured],
    }
    try:
        write_json(file, found)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror or error}); name a file by --output") from None
    for one in different:
        console.print(
            f"{one.task}: {one.scores.accuracy} here, {one.run_accuracy} in the run: another device, precision, batch "
            "size or number of processes?",
            highlight=False,
        )
    console.print(f"\nevaluation {file}", highlight=False, markup=False, soft_wrap=True)
