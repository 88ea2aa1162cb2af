"""The small frontier: every method on split digits at equal learning accuracy, and the measured half of docs/results.md.

make results, or:
python -m bench.results_page [--seeds 0,1,2] [--select-seeds 3,4] [--jobs 2] [--runs runs/split_digits]

The sweep is that of `command`. Its runs are started here, each a fork of this process, so that none spends the seconds that
importing the libraries takes; what is complete is skipped, so that the line can be given again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import common, recompute
from bench.forks import run_missing
from nostalgia import sweep

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
KEPT = ROOT / "docs" / "results"
PROVENANCE = "provenance.json"
MARKS = "<!-- measured: begin -->", "<!-- measured: end -->"
# ewc_lora is left out: it needs LoRA adapters, which this network from scratch does not have.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "finetune": (),
    "joint": (),
    "heads_only": (),
    "nostalgia": (16, 32),
    "kronecker": (10, 100),
    "nostalgia_ewc": (10, 1000),
    "ewc": (100, 10000),
    "si": (1, 100),
    "l2sp": (0.01, 1),
    "lwf": (0.3, 3),
    "er": (0.3, 1),
    "derpp": (0.3, 1),
    "agem": (1_000_000,),
    "gpm": (0.9, 0.99),
    "averaging": (0.5, 0.75),
}
WORDS = ("--suite", "split_digits", "train.accelerator=cpu", "logger.tensorboard=false", "logger.report=false")


def command(seeds: str, select: str, runs: Path) -> list[str]:
    """The words of the sweep."""
    grids = ",".join(f"{name}={','.join(f'{v:g}' for v in grid)}" for name, grid in STRENGTHS.items() if grid)
    out = f"experiment.output_dir={runs}"
    return [
        *WORDS,
        "--methods",
        ",".join(STRENGTHS),
        "--strengths",
        grids,
        "--seeds",
        seeds,
        "--select-seeds",
        select,
        out,
    ]


def write_page(runs: Path, words: Sequence[str]) -> None:
    """The measured half of the page, and the files it is made of beside it."""
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in ("frontier.json", "frontier.csv", "frontier.png"):
        shutil.copyfile(runs / name, KEPT / f"split_digits_{name}")
    shutil.copyfile(runs / PROVENANCE, KEPT / f"split_digits_{PROVENANCE}")
    facts = json.loads((runs / PROVENANCE).read_text())
    table = (runs / "frontier.md").read_text()
    text = f"""{MARKS[0]}
## Split digits, measured

Scikit-learn's digits in five tasks of two classes (suite `split_digits`), a ViT of two layers of width 32 from scratch.

{table}
![Learning accuracy against final accuracy and backward transfer](results/split_digits_frontier.png)

Hardware: {facts["hardware"]}. Commit: {facts["commit"]}. One command for all of it is `make results`; the sweep is

```
python -m nostalgia.sweep {facts["command"]}
```

All points of all strengths are in [results/split_digits_frontier.json](results/split_digits_frontier.json), from which every
number of the table is taken; `python -m bench.recompute {runs}` computes them again from the accuracy matrices of the runs.
`ewc_lora` is left out: it needs LoRA adapters.
{MARKS[1]}
"""
    page = PAGE.read_text() if PAGE.exists() else f"# Results\n\n{MARKS[0]}\n{MARKS[1]}\n"
    before, rest = page.split(MARKS[0])
    PAGE.write_text(before + text.rstrip("\n") + rest.split(MARKS[1])[1])


def record(runs: Path, words: Sequence[str]) -> None:
    """Note commit (``+``: with changes to it), hardware and command beside the runs, once: before the first of them."""
    if not (runs / PROVENANCE).exists():
        facts = {"commit": common.origin()["commit"], "hardware": hardware(), "command": " ".join(words)}
        runs.mkdir(parents=True, exist_ok=True)
        (runs / PROVENANCE).write_text(json.dumps(facts, indent=1) + "\n")


def hardware() -> str:
    """Processor, cores and memory, in words."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{os.cpu_count()} cores of {model[1] if model else platform.processor() or platform.machine()}, one thread a run"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.results_page", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", default="0,1,2", help="reported (default %(default)s)")
    parser.add_argument("--select-seeds", default="3,4", help="strengths are chosen on them (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/split_digits"), help="folder of the runs")
    options = parser.parse_args(arguments)
    words = command(options.seeds, options.select_seeds, options.runs)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    record(options.runs, words)
    cells = sweep.cells(sweep.read_options(words))
    run_missing([cell.job for cell in cells], options.jobs)
    code = sweep.main(words)  # runs again what failed, and writes the table
    if code:
        return code
    write_page(options.runs, words)
    return recompute.main([str(options.runs)])


if __name__ == "__main__":
    sys.exit(main())
