"""Runs methods x seeds of one suite, whatever of them is missing, and puts them side by side.

python -m nostalgia.sweep --suite demo --methods nostalgia,finetune,joint --seeds 0,1,2 [KEY=VALUE ...]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nostalgia.config import Config, parse
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.experiment.data_check import absolute_paths
from nostalgia.experiment.method_choice import changes, complete_method
from nostalgia.logging.results import RunResults, read_results
from nostalgia.logging.streams import make_console
from nostalgia.methods.loading import method_class, method_code
from nostalgia.sweep_runner import Job, Start, run_jobs, start_here
from nostalgia.sweep_slurm import SlurmStarter, read_parameters
from nostalgia.utils.arguments import CommandParser, ended
from nostalgia.utils.yaml_files import read_yaml

EXAMPLES = """examples:
  python -m nostalgia.sweep --suite demo --methods nostalgia,finetune,joint --seeds 0,1,2
  python -m nostalgia.sweep --suite demo --seeds 0 nostalgia.top_k=128 experiment.output_dir=runs/k128
  NPROC=1 python -m nostalgia.sweep --suite demo --methods finetune --seeds 0,1,2,3 --parallel 2
  python -m nostalgia.sweep --suite demo --methods finetune,ewc,kronecker --strengths auto --seeds 0,1 --select-seeds 2

All other words are those of nostalgia.train. A run's folder is <experiment.output_dir>/<method>/seed<seed>, and
its output is in seed<seed>.log beside it. What is complete is skipped and what was interrupted goes on, so the
same line can be given again. Each run is started as by launch/ddp.sh: NPROC processes, or one a GPU. Exit codes:
0 all runs are complete, 2 wrong usage, 3 data or weights not found, 4 some failed, 75 interrupted.
"""
OURS = ("--run-dir", "--resume", "method", "method.name", "experiment.seed")  # words the sweep chooses itself
# What a run may change when it resumes, but not beside others: the batch, and what computes.
OF_THE_NUMBERS = frozenset({"dataset.batch_size", "train.gradient_accumulation_steps", "train.accelerator"})

# None: as configured; a tuple: of every method that has one, its own grid where empty; a mapping: by method.
Strengths = tuple[float, ...] | Mapping[str, tuple[float, ...]] | None


@dataclass(frozen=True)
class Options:
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    parallel: int | None  # None: one at a time here, all at once under Slurm
    dry_run: bool
    words: tuple[str, ...]  # for nostalgia.train
    strengths: Strengths = None
    select_seeds: tuple[int, ...] = ()
    budget_minutes: float | None = None  # starts no run after that
    slurm: Mapping[str, Any] | None = None  # submitit's parameters; None: runs are processes of this machine


@dataclass(frozen=True)
class Cell:
    """A run of the sweep, and where it stands in the comparison."""

    job: Job
    method: str
    strength: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    return ended(lambda given: sweep(read_options(given)), arguments)


def sweep(options: Options) -> int:
    """Run what is missing and print the comparison of what is complete; returns the exit code."""
    console = make_console()
    all_cells = cells(options)
    jobs = [cell.job for cell in all_cells]
    missing = [job for job in jobs if not job.complete]
    console.print(f"{len(jobs)} runs, {len(jobs) - len(missing)} complete already", highlight=False)
    if options.dry_run:
        for job in jobs:
            state = "complete" if job.complete else "to go on" if (job.folder / "config.yaml").exists() else "to run"
            console.print(f"{job.name:<24} {state:<9} {job.folder}", highlight=False, markup=False, soft_wrap=True)
        return 0
    start: Start = start_here
    parallel = options.parallel or 1
    if options.slurm is not None:
        output = Path(parse(list(options.words)).config.experiment.output_dir).expanduser()
        start, parallel = SlurmStarter(options.slurm, output / "slurm"), options.parallel or max(len(missing), 1)
    outcomes = run_jobs(missing, parallel, console, options.budget_minutes, start)
    done = [cell for cell in all_cells if cell.job.complete or outcomes[cell.job.name].code == 0]
    if done:
        show(done, options, console)
    failed = [outcome for outcome in outcomes.values() if outcome.code not in (0, 75)]
    stopped = [outcome for outcome in outcomes.values() if outcome.code == 75]
    for outcome in failed:
        print(f"error: {outcome.line()}", file=sys.stderr)
    if stopped:
        print(f"interrupted: {len(stopped)} of {len(jobs)} runs are left; give the same line again", file=sys.stderr)
    return 4 if failed else 75 if stopped else 0


def cells(options: Options) -> list[Cell]:
    """A run for each seed, method and strength, the words checked.

    Raises UsageError where a finished run had other settings, and for a strength that a method does not have.
    """
    return [
        _cell(method, strength, seed, options)
        for seed in (*options.select_seeds, *options.seeds)  # what strengths are chosen on comes first
        for method in options.methods
        for strength in _strengths(method, options.strengths)
    ]


def _cell(method: str, strength: float | None, seed: int, options: Options) -> Cell:
    words = [*options.words, "--quiet", f"method={method}", f"experiment.seed={seed}"]
    label, name = f"{method} seed {seed}", _folder_name(method, options.methods)
    if strength is not None:
        text = _strength_text(strength)
        words.append(f"method.{method_class(method).strength_option}={text}")
        label, name = f"{method} {text} seed {seed}", f"{name}/strength_{text}"
    config = parse(words).config
    try:
        complete_method(config)
    except UsageError as error:
        if len(options.methods) == 1 or not str(error).startswith("unknown key method."):
            raise
        raise UsageError(
            f"method={method}: {error}; options of one method alone are methods.<name>.<option>="
        ) from None
    absolute_paths(config)
    folder = Path(config.experiment.output_dir).expanduser() / name / f"seed{seed}"
    return Cell(Job(label, folder, tuple(words), is_complete(folder, config)), method, strength)


def _strength_text(strength: float) -> str:
    whole = strength == int(strength) and abs(strength) < 1e15
    return f"{strength:.0f}" if whole else f"{strength:.12g}"  # 1e+06 is no whole number of bytes


def _strengths(method: str, wanted: Strengths) -> Sequence[float | None]:
    """The strengths a method is run at: None is as it is configured."""
    if isinstance(wanted, Mapping):
        return wanted.get(method, [None])
    grid = method_class(method).strengths if wanted is not None else ()
    return [None] if not grid else list(wanted or grid)


def _folder_name(method: str, methods: Sequence[str]) -> str:
    """The name of its class; with its module where two of the sweep's classes are called alike."""
    short = method.split(":")[-1]
    alike = [other for other in methods if other.split(":")[-1] == short]
    return short if len(alike) == 1 else method.replace(":", ".")


def is_complete(folder: Path, config: Config) -> bool:
    """Whether ``folder`` holds the results of ``config``; raises UsageError where they are of another one."""
    try:
        results = read_results(folder / "results")
        saved = read_yaml(folder / "config.yaml")
    except NotFoundError:
        return False
    saved = saved if isinstance(saved, dict) else {}
    changed = differences(saved, config)
    name = str(config.method["name"])
    if results.details.get("method_code", "") != method_code(name):
        changed.append(f"the code of method={name}")
    if changed:
        raise UsageError(
            f"{folder}: holds a finished run of other settings ({'; '.join(changed[:3])}); name another "
            "experiment.output_dir, or remove it"
        )
    return not _unfinished(folder, saved)


def _unfinished(folder: Path, saved: Mapping[str, Any]) -> bool:
    """Whether the run ended while it wrote what it leaves beside its results, and can go on from a checkpoint to write it."""
    wanted = [folder / "export"] if saved["experiment"].get("export") else []
    wanted += [folder / "results" / "report.html"] if saved.get("logger", {}).get("report") else []
    return not all(path.exists() for path in wanted) and any((folder / "checkpoints").glob("0*"))


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """What differs between a saved configuration and ``config`` and matters, a text each."""
    found = changes(saved, config, fixed=OF_THE_NUMBERS)
    if config.train.precision == "auto":  # a run records what it became
        found = [text for text in found if not text.startswith("train.precision was ")]
    return found


def show(cells: Sequence[Cell], options: Options, console: Any) -> None:
    """The table of methods, mean and standard deviation over seeds, and the report of all runs together.

    Where strengths were searched, the comparison at equal learning accuracy, beside the runs in frontier.*.
    """
    folders = [cell.job.folder for cell in cells]
    if options.strengths is not None:
        show_frontier(cells, options, console)
        return
    # Drawing takes seconds to import: nothing above should wait for it.
    from nostalgia.analysis.compare import compare, shown
    from nostalgia.analysis.report import write_report

    console.print()
    compare(folders, console)
    page = write_report(list(folders), folders[0].parent.parent / "report.html")
    console.print(f"all together {shown(page)}", highlight=False, markup=False, soft_wrap=True)


def show_frontier(cells: Sequence[Cell], options: Options, console: Any) -> None:
    """Write and print the comparison at equal learning accuracy."""
    from nostalgia.analysis.figures_frontier import frontier_figure
    from nostalgia.analysis.frontier import frontier, markdown, write_frontier
    from nostalgia.analysis.report import write_report

    runs: dict[tuple[str, float | None], list[RunResults]] = {}
    for cell in cells:
        runs.setdefault((cell.method, cell.strength), []).append(read_results(cell.job.folder / "results"))
    found = frontier(runs, options.select_seeds)
    output = Path(parse(list(options.words)).config.experiment.output_dir).expanduser()
    paths = write_frontier(output, found)
    paths["frontier.png"] = output / "frontier.png"
    frontier_figure(found).savefig(paths["frontier.png"], dpi=150)
    paths["report.html"] = write_report(
        [cell.job.folder for cell in cells], output / "report.html", options.select_seeds
    )
    console.print()
    console.print(markdown(found), highlight=False, markup=False, soft_wrap=True)
    for path in paths.values():
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def read_options(arguments: list[str]) -> Options:
    """Split the sweep's own options from the words of nostalgia.train; raises UsageError."""
    flags, words = _parser().parse_known_args(arguments)
    for word in words:
        if word.split("=")[0] in OURS:
            raise UsageError(f"{word.split('=')[0]}: the sweep chooses it; use --methods and --seeds")
    methods = [name for name in flags.methods.split(",") if name]
    try:
        seeds = [int(seed) for seed in flags.seeds.split(",") if seed]
    except ValueError:
        raise UsageError(f"--seeds {flags.seeds}: whole numbers separated by commas, such as 0,1,2") from None
    for name, values in (("--methods", methods), ("--seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{name} {getattr(flags, name[2:])}: name at least one, and each once")
    if flags.parallel is not None and flags.parallel < 1:
        raise UsageError(f"--parallel {flags.parallel}: allowed is 1 or more")
    if flags.budget_minutes is not None and not flags.budget_minutes >= 0:
        raise UsageError(f"--budget-minutes {flags.budget_minutes:g}: allowed is 0 or more")
    try:
        select = [int(seed) for seed in (flags.select_seeds or "").split(",") if seed]
        strengths = _read_strengths(flags.strengths, methods)
    except ValueError:
        raise UsageError(
            f"--strengths {flags.strengths}, --select-seeds {flags.select_seeds}: numbers separated by commas; strengths "
            "also auto, or by method: ewc=10,100,si=0.1"
        ) from None
    if set(select) & set(seeds):
        raise UsageError(f"--select-seeds {flags.select_seeds}: other seeds than those reported, --seeds {flags.seeds}")
    if select and flags.strengths is None:
        raise UsageError("--select-seeds goes with --strengths: strengths are selected on them")
    return Options(
        tuple(methods),
        tuple(seeds),
        flags.parallel,
        flags.dry_run,
        tuple(words),
        strengths,
        tuple(select),
        flags.budget_minutes,
        None if flags.slurm is None else read_parameters(flags.slurm),
    )


def _read_strengths(text: str | None, methods: Sequence[str]) -> Strengths:
    """``auto``, numbers, or numbers by method; raises ValueError for a word that is no number."""
    if text in (None, "auto"):
        return None if text is None else ()
    if "=" not in text:
        return _each_once(text, [float(value) for value in text.split(",") if value])
    found: dict[str, list[float]] = {}
    method = ""
    for word in text.split(","):
        name, equals, value = word.rpartition("=")
        method = name if equals else method
        if method not in methods or not method_class(method).strengths:
            raise UsageError(f"--strengths {word}: {method or 'nothing'} is none of --methods that has a strength")
        found.setdefault(method, []).append(float(value))
    return {name: _each_once(text, values) for name, values in found.items()}


def _each_once(text: str, strengths: Sequence[float]) -> tuple[float, ...]:
    """``strengths`` of one method; one named twice would be the same run, counted as two."""
    if not all(map(math.isfinite, strengths)) or len(set(map(_strength_text, strengths))) < len(strengths):
        raise UsageError(f"--strengths {text}: finite numbers, and each once")
    return tuple(strengths)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="nostalgia.sweep",
        usage="python -m nostalgia.sweep --suite NAME --methods A,B --seeds 0,1 [options] [KEY=VALUE ...]",
        description="Run methods x seeds of one suite and put them side by side.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--methods", default="nostalgia,finetune,joint", metavar="A,B", help="default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", metavar="0,1", help="default: %(default)s")
    parser.add_argument(
        "--strengths",
        metavar="auto|A,B|METHOD=A,B,...",
        help="run each method over strengths, its own grid, these, or those of its name (the others as configured), and "
        "compare at equal learning accuracy",
    )
    parser.add_argument("--select-seeds", metavar="3,4", help="choose strengths on these seeds, report the others")
    parser.add_argument("--budget-minutes", type=float, metavar="M", help="start no run after M minutes")
    parser.add_argument(
        "--parallel", type=int, metavar="N", help="runs at a time; GPUs are shared out (default 1; Slurm: all)"
    )
    parser.add_argument(
        "--slurm",
        metavar="KEY=VALUE,...",
        help="each run as a Slurm job of one node, by submitit with these parameters: "
        "partition=gpu,gpus_per_node=4,timeout_min=240",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their folders; run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
