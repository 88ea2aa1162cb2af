"""The command line of ``nostalgia.train``: what its flags and words ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nostalgia.config.aliases import EVERY_METHOD
from nostalgia.config.compose import (
    GROUPS,
    OWN_SUITE,
    choices,
    from_file,
    from_groups,
    from_run,
    nearest_key,
    suite_choice,
    translate,
)
from nostalgia.config.schema import Config
from nostalgia.errors import UsageError
from nostalgia.utils.arguments import CommandParser

# What --debug changes; the command line still has the last word.
DEBUG = (
    "train.epochs=1",
    "train.epochs_per_task=null",
    "train.warmup_epochs=0",
    "train.max_steps_per_epoch=2",
    "train.max_eval_batches=1",
    "train.log_every_n_steps=1",
    "nostalgia.top_k=2",
    "nostalgia.k_max=null",
    f"methods.{EVERY_METHOD}.num_samples=8",
    f"methods.{EVERY_METHOD}.tail_samples=8",
    "curvature.max_basis=null",
    "curvature.num_samples=8",
    "curvature.tol=0.5",
    "curvature.max_products=6",
    "analysis.captured_energy_samples=8",
    "analysis.top_k=2",
    "analysis.trace_samples=1",
    "dataset.num_workers=0",
)
DEBUG_BATCH = 32  # images a step at most with --debug on a CPU, where the command line names no batch size

EXAMPLES = """examples:
  accelerate launch -m nostalgia.train --suite main
  python -m nostalgia.train --suite demo method=finetune
  python -m nostalgia.train dataset=digits model=vit_tiny experiment.num_tasks=2 train.epochs=20
  python -m nostalgia.train experiment.tasks=[cifar100,cub200,flowers102] model=vit dataset.root=/data
  python -m nostalgia.train dataset=digits experiment.split=classes experiment.num_tasks=5 model=vit_tiny
  python -m nostalgia.train --debug --suite main      a few batches a task, everything else real
  python -m nostalgia.train --suite main --dry-run    what would run, and which data is there; trains nothing
  python -m nostalgia.train --config RUN_DIR/config.yaml
  python -m nostalgia.train --resume RUN_DIR          go on where a run was interrupted, to the bit

KEY=VALUE words are Hydra overrides of the files under configs/. Exit codes: 0 done, 2 wrong usage or
configuration, 3 data or weights not found, 4 run failed, 75 interrupted with a checkpoint written.
"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    config: Config
    suite: str | None
    debug: bool
    dry_run: bool
    quiet: bool
    argv: tuple[str, ...]
    run_dir: Path | None = None  # the run's folder, where it is given
    resume: str | None = None  # "must" go on in ``run_dir``, or "auto": begin there where there is no run
    resume_override: bool = False
    small_batch: bool = False  # on a CPU, at most `DEBUG_BATCH` images a step

    def fit_to(self, device: str) -> list[str]:
        """Change what ``--debug`` changes on a ``device`` alone; one line for each."""
        given = self.config.dataset.batch_size
        if not self.small_batch or device != "cpu" or given <= DEBUG_BATCH:
            return []
        self.config.dataset.batch_size = DEBUG_BATCH
        return [f"--debug on a CPU: {DEBUG_BATCH} images a step; dataset.batch_size={given} takes the run's own"]


def parse(argv: list[str]) -> Request:
    """The checked configuration for a command line; raises UsageError with one line for anything wrong in it."""
    flags, words = _parser().parse_known_args(argv)
    for word in words:
        if word.startswith("-"):
            raise UsageError(f"unknown option {word.split('=')[0]}{nearest_key(word.split('=')[0], _flags())}")
        if "=" not in word and not word.startswith("~"):
            raise UsageError(f"cannot read {word!r}: expected KEY=VALUE, such as train.epochs=20")
    if flags.suite is not None:
        words.insert(0, f"suite={suite_choice(flags.suite)}")
    words = [translated for word in words if (translated := translate(word))]
    if flags.resume_override and flags.resume is None:
        raise UsageError("--resume-override goes with --resume RUN_DIR")
    suite = next((w.removeprefix("suite=") for w in reversed(words) if w.startswith("suite=")), None)
    debug = [translate(word) for word in DEBUG] if flags.debug else []
    groups = [w for w in words if w.split("=")[0].lstrip("+") in GROUPS]
    run_dir = None if flags.run_dir is None else Path(flags.run_dir)
    resume = flags.resume
    if resume == "auto" and run_dir is None:
        raise UsageError("--resume auto needs --run-dir DIR: the folder to go on in, or to begin in")
    if resume not in (None, "auto", "latest"):
        if run_dir is not None:
            raise UsageError(f"--resume {resume} names the folder itself: leave --run-dir out")
        run_dir = Path(resume)
    if flags.config is not None:
        config = from_file(Path(flags.config), debug + words)
    elif resume not in (None, "auto", "latest") and not groups:
        config = from_run(Path(resume), debug + words)
    else:
        config = from_groups(groups + debug + [w for w in words if w not in groups])
    if resume == "latest" and run_dir is None:
        run_dir = (Path(config.experiment.output_dir).expanduser() / "latest").resolve()
    return Request(
        config=config,
        suite=None if suite is None else suite.removeprefix(OWN_SUITE),
        debug=flags.debug,
        dry_run=flags.dry_run,
        quiet=flags.quiet,
        argv=tuple(argv),
        run_dir=run_dir,
        resume=None if resume is None else "auto" if resume == "auto" else "must",
        resume_override=flags.resume_override,
        small_batch=flags.debug and resume in (None, "auto") and not any(map(_is_batch_size, words)),
    )


def _is_batch_size(word: str) -> bool:
    return word.partition("=")[0].lstrip("+") == "dataset.batch_size"


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="nostalgia.train",
        usage="python -m nostalgia.train [--suite NAME|FILE.yaml] [options] [KEY=VALUE ...]",
        description="Continual fine-tuning of a vision backbone that does not forget.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--suite", metavar="NAME", help=f"one of {', '.join(choices('suite'))}, or a YAML file of your own"
    )
    parser.add_argument("--debug", action="store_true", help="a few batches and products a task, small ones on a CPU")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, with each data set; train nothing"
    )
    parser.add_argument("--config", metavar="FILE", help="run a saved config.yaml again")
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="go on with a run that was interrupted: its folder, `latest`, or `auto` (go on in --run-dir where there "
        "is a run, else begin there)",
    )
    parser.add_argument("--run-dir", metavar="DIR", help="the run's folder, instead of a new one by date and time")
    parser.add_argument("--resume-override", action="store_true", help="go on although the configuration has changed")
    parser.add_argument("--quiet", action="store_true", help="do not print the configuration")
    return parser


def _flags() -> list[str]:
    return [option for action in _parser()._actions for option in action.option_strings]
