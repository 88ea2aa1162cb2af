"""A run from its request to its last file."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import OmegaConf

from nostalgia.config import Request
from nostalgia.data.tasks import data_notes
from nostalgia.experiment.components import Components, build_components
from nostalgia.experiment.data_check import absolute_paths, check_data, record_data
from nostalgia.experiment.dry_run import dry_run
from nostalgia.experiment.experiment import Experiment
from nostalgia.experiment.full_run import cost_of_full_run, full_run_of
from nostalgia.experiment.info import check_figures, run_info, run_notes
from nostalgia.experiment.method_choice import complete_method
from nostalgia.experiment.resume import ResumedRun, open_run, point_latest_at
from nostalgia.logging.console import print_config, start_panel
from nostalgia.logging.progress import Progress
from nostalgia.logging.streams import make_console
from nostalgia.parallel.coordination import on_main


def _same_data(folder: Path, run: Components, request: Request, resumed: ResumedRun | None) -> None:
    """Record the images of a run that begins, which is the latest from here on; refuse to go on with others unless wanted."""
    if resumed is not None and resumed.state is not None and not request.resume_override:
        check_data(folder, run.tasks, "give --resume-override to go on all the same")
    else:
        record_data(folder, run.tasks, run.config)
    if resumed is None or resumed.state is None:
        point_latest_at(folder)


def run(request: Request, accelerator: Accelerator, precision: str) -> Path | None:
    """Run what the command line asks for; returns the run's folder (None for a dry run)."""
    notes = [*complete_method(request.config), *request.fit_to(accelerator.device.type)]
    check_figures(request.config)
    if not request.dry_run:
        request.config.train.precision = precision  # what auto became is the run's, wherever it goes on
        absolute_paths(request.config)
    folder, resumed = (None, None) if request.dry_run else open_run(request, accelerator)
    config = request.config
    set_seed(config.experiment.seed, device_specific=True, deterministic=config.experiment.deterministic)
    if config.train.detect_anomaly:
        torch.autograd.set_detect_anomaly(True)
    if folder is None:
        dry_run(request, accelerator, precision, run_info, notes)
        return None
    components = build_components(config, accelerator, precision)
    on_main(accelerator, lambda: _same_data(folder, components, request, resumed))
    console = make_console(quiet=not accelerator.is_main_process)
    print_config(
        console,
        OmegaConf.to_container(OmegaConf.structured(config), resolve=True),  # type: ignore[arg-type]
        quiet=request.quiet,
        path=folder / "config.yaml",
    )
    info = run_info(components, request, folder)
    console.print(start_panel(info))
    for line in (*notes, *run_notes(config, accelerator), *data_notes(components.tasks)):
        console.print(f"note: {line}", highlight=False, markup=False, soft_wrap=True)
    with Progress(accelerator.is_main_process, len(components.tasks), console=console) as progress:
        experiment = Experiment(components, folder, progress, resumed)
        results = experiment.run()
    full = full_run_of(request, components) if request.debug else ()
    if accelerator.is_main_process:
        from nostalgia.experiment.deliverables import write_deliverables  # matplotlib: a dry run draws nothing

        write_deliverables(folder, components, results, request.argv, console, experiment.log)
        if full:
            console.print(cost_of_full_run(*full, components, info, folder))
    experiment.log.finish(results)
    accelerator.wait_for_everyone()
    return folder
