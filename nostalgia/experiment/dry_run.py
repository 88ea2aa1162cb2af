"""``--dry-run``: what a run would do with the data and weights that are here, and how to get the rest.

Nothing is downloaded, nothing trained. All tasks are listed, those whose data is missing too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator, DistributedType
from omegaconf import OmegaConf
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import cuda

from nostalgia.analysis.scale_model import Cluster, stages, table
from nostalgia.config import Config, Request
from nostalgia.config.checks import gpu_precision
from nostalgia.data.tasks import Missing, Task, data_notes, find_tasks, head_classes
from nostalgia.errors import NotFoundError
from nostalgia.experiment.components import Components, build_components
from nostalgia.experiment.scale import load_of, uncounted
from nostalgia.experiment.task_data import placeholder, source_loader, task_specs
from nostalgia.logging.console import RunInfo, count, print_config, start_panel
from nostalgia.logging.streams import make_console
from nostalgia.parallel.coordination import agree
from nostalgia.utils.counts import steps_per_epoch

MAX_LINES = 12  # of what is said of one missing data set


def dry_run(
    request: Request,
    accelerator: Accelerator,
    precision: str,
    run_info: Callable[[Components, Request, Path], RunInfo],
    notes_of_method: Sequence[str] = (),
) -> None:
    """Print it; NotFoundError at the end, on all ranks, where data or weights are missing."""
    config = request.config
    found = agree(
        accelerator,
        lambda: find_tasks(task_specs(config), source_loader(config, download=False), config.experiment.seed),
    )
    console = make_console(quiet=not accelerator.is_main_process)
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    print_config(console, plain, quiet=request.quiet)  # type: ignore[arg-type]
    tasks = [placeholder(one) if isinstance(one, Missing) else one for one in found]
    no_weights, plan = "", None
    try:
        parts = build_components(config, accelerator, precision, tasks=tasks, download_weights=False)
        console.print(start_panel(run_info(parts, request, Path(config.experiment.output_dir))))
        plan = _plan(parts, accelerator)
    except NotFoundError as error:
        no_weights = str(error)
    console.print(_steps_table(config, found, accelerator.num_processes))
    notes = [*notes_of_method, *data_notes(tasks)]
    if plan is not None:
        console.print(plan)
        notes = [*uncounted(found), *notes]
    for line in notes:
        console.print(f"note: {line}", highlight=False, markup=False, soft_wrap=True)
    missing: dict[str, list[str]] = {}  # why -> tasks
    for one in found:
        if isinstance(one, Missing):
            missing.setdefault(one.why, []).append(one.name)
    for why, names in missing.items():
        _print_missing(console, names, why, config.dataset.download)
    if no_weights:
        console.print("\nweights", style="bold")
        line = f"{no_weights}; what the basis takes is known once they are there"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    agree(accelerator, lambda: _decode_one([one for one in found if isinstance(one, Task)]))
    _refuse([name for names in missing.values() for name in names], no_weights)


def _plan(parts: Components, accelerator: Accelerator) -> Group:
    """What ``nostalgia.plan`` says of as many GPUs as there are processes; their memory is that of the GPU at hand."""
    here = {"memory": cuda.get_device_properties(0).total_memory / 1e9} if accelerator.device.type == "cuda" else {}
    ranks, load = accelerator.num_processes, load_of(parts, parts.precision if here else gpu_precision(parts.config))
    cluster = Cluster(
        gpus=ranks,
        nodes=max(1, ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks))),
        sharded=accelerator.distributed_type == DistributedType.FSDP,
        **here,
    )
    on_cpu = "" if here else "As on GPUs, which this run does not use. "
    line = f"{on_cpu}Rates are an H200's; python -m nostalgia.plan takes others, and other numbers of GPUs."
    return Group(table(load, cluster, stages(load, cluster)), Text(line))


def _decode_one(tasks: Sequence[Task]) -> None:
    """Read an image of each part: NotFoundError where it is none, such as the pointer files of Git LFS."""
    for task in tasks:
        for part in (task.train, task.val):
            if len(part):
                part.image(0)


def _refuse(missing: Sequence[str], no_weights: str) -> None:
    what = [f"the data of {', '.join(missing)}"] if missing else []
    what += ["the model's weights"] if no_weights else []
    if what:
        raise NotFoundError(f"dry run: missing on this machine: {' and '.join(what)}; above is how to get it")


def _steps_table(config: Config, found: Sequence[Task | Missing], world_size: int) -> Table:
    """Data, head and steps of each task, found or missing."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("task", overflow="ellipsis", no_wrap=True, max_width=26)
    table.add_column("data", no_wrap=True)
    for name in ("train", "val"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("head", overflow="fold")
    table.add_column("steps", justify="right", overflow="fold")
    outputs = head_classes([task for task in found if isinstance(task, Task)])
    for one in found:
        if isinstance(one, Missing):
            table.add_row(Text(one.name), "missing", "?", "?", "?", "?")
            continue
        shared = "" if one.head == one.name else f" of {one.head}"
        head = f"{len(outputs[one.head])} outputs{shared}"
        sizes = (f"{len(one.train):,}", f"{len(one.val):,}")
        table.add_row(Text(one.name), "found", *sizes, Text(head), _steps(config, one, world_size))
    return table


def _steps(config: Config, task: Task, world_size: int) -> str:
    """``40 x 50 epochs = 2.00k``."""
    train = config.train
    batch = config.dataset.batch_size * train.gradient_accumulation_steps * world_size
    steps = steps_per_epoch(len(task.train), batch, train.max_steps_per_epoch)
    epochs = train.epochs if train.epochs_per_task is None else train.epochs_per_task[task.index - 1]
    return f"{steps} x {epochs} = {count(steps * epochs)}"


def _print_missing(console: Console, names: Sequence[str], why: str, download: bool) -> None:
    console.print(f"\n{', '.join(names)}", style="bold", highlight=False)
    for line in why.splitlines()[:MAX_LINES]:
        if line.strip().startswith("downloads: off"):
            line = "  downloads: a dry run makes none" + ("; the run itself would try" if download else "")
        console.print(line, highlight=False, markup=False, soft_wrap=True)
