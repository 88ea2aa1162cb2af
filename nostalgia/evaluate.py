"""``python -m nostalgia.evaluate RUN_DIR``: measures a finished run again, from the model in its ``export/``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nostalgia import config as configuration
from nostalgia.command import run_command
from nostalgia.config import Config
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.utils.arguments import CommandParser

#: What may differ from the run: where data is and how it is read, never what is measured.
ALLOWED = (
    "dataset.root",
    "dataset.batch_size",
    "dataset.num_workers",
    "dataset.download",
    "dataset.entries",
    "train.precision",
    "train.accelerator",
    "train.devices",
    "train.timeout_minutes",
    "train.max_eval_batches",
)

EPILOG = f"""examples:
  python -m nostalgia.evaluate runs/main/latest
  python -m nostalgia.evaluate runs/main/latest dataset.root=/data --task task1_cifar100
  python -m nostalgia.evaluate runs/main/latest --data /my/photos --task task2_cub200
  torchrun --nproc_per_node 2 -m nostalgia.evaluate runs/main/latest

On the run's kind of device and number of processes the accuracies are those of results/results.json, digit for digit.
FOLDER holds a folder of images for each class, under the class's name (or val/<class>/*); domain shifts of the task
are applied to it as to the task's own images. KEY=VALUE words may be {", ".join(ALLOWED)}.
"""


@dataclass(frozen=True)
class EvaluationRequest:
    """What the command line asks for; ``config`` is the run's, with the overrides."""

    config: Config
    run_dir: Path
    data: Path | None
    task: str | None
    output: Path | None


def parse(argv: list[str]) -> EvaluationRequest:
    """Raises UsageError for a command line that cannot be meant, NotFoundError where there is no such run."""
    parser = CommandParser(
        prog="nostalgia.evaluate",
        usage="python -m nostalgia.evaluate RUN_DIR [--task NAME] [--data FOLDER] [KEY=VALUE ...]",
        description="Measure a finished run again, class by class: on its own tasks, or on a folder of images.",
        epilog=EPILOG,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's folder")
    parser.add_argument("--task", metavar="NAME", help="only this task, by name or number")
    parser.add_argument("--data", metavar="FOLDER", help="a folder of images instead of the task's own")
    parser.add_argument("--output", metavar="FILE", help="where the numbers go; RUN_DIR/results/evaluation.json")
    parser.add_argument("words", metavar="KEY=VALUE", nargs="*", help="overrides of the run's configuration")
    flags = parser.parse_intermixed_args(argv)
    for word in flags.words:
        key = word.partition("=")[0].lstrip("+")
        if "=" not in word or not any(key == known or key.startswith(f"{known}.") for known in ALLOWED):
            raise UsageError(f"{word}: an evaluation takes KEY=VALUE of {', '.join(ALLOWED)}")
    run_dir = Path(flags.run_dir).expanduser()
    if not (run_dir / "config.yaml").is_file():
        raise NotFoundError(f"{run_dir}: no config.yaml there; give the folder of a run, such as runs/demo/latest")
    if flags.data is not None and not Path(flags.data).expanduser().is_dir():
        raise NotFoundError(f"--data {flags.data}: no such folder")
    # The launcher decides the number of processes, whatever the run had.
    words = ["--config", str(run_dir / "config.yaml"), "train.devices=auto", *flags.words]
    return EvaluationRequest(
        config=configuration.parse(words).config,
        run_dir=run_dir.resolve(),
        data=None if flags.data is None else Path(flags.data).expanduser(),
        task=flags.task,
        output=None if flags.output is None else Path(flags.output).expanduser(),
    )


def main(argv: list[str] | None = None) -> int:
    """Exit codes as those of `nostalgia.train`."""

    def run(request: Any, accelerator: Any, precision: str) -> None:
        from nostalgia.experiment.remeasure import remeasure

        remeasure(request, accelerator, precision)

    return run_command(argv, parse, run)


if __name__ == "__main__":
    sys.exit(main())
