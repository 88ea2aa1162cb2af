"""Everything that needs a GPU, by one command: tests, benchmarks, two ranks on one card, a real training.

python -m bench.gpu --out gpu_results            all of it, on one GPU, about half an hour
python -m bench.gpu --device cpu --small         the same commands at their smallest, to see that they run

Each stage is a command of its own, in a process of its own: one that fails costs its row, not the others. OUT holds a log
and, of benchmarks, a JSON a stage, and all of them in results.json with the machine, the commit and the commands.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.common import machine

TIMEOUT = 1200  # seconds a stage
RESULTS = ("acc", "bwt", "learning_accuracy", "seconds", "overhead_seconds", "memory_bytes")


@dataclass
class Stage:
    """One command; ``environment`` is added to this process's."""

    name: str
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    writes_json: bool = False


@dataclass
class Outcome:
    """How a stage ended; ``result`` is its JSON, or what a run's results.json says."""

    name: str
    command: str
    exit_code: int | None  # None: stopped after TIMEOUT
    seconds: float
    result: Any = None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="smallest sizes")
    parser.add_argument("--only", help="names of stages, separated by commas; default: all")
    options = parser.parse_args(arguments)
    stages = all_stages(options.device, options.small, options.out)
    if options.only:
        unknown = set(options.only.split(",")) - {stage.name for stage in stages}
        if unknown:
            allowed = ", ".join(stage.name for stage in stages)
            parser.error(f"--only {', '.join(sorted(unknown))}: allowed are {allowed}")
        stages = [stage for stage in stages if stage.name in options.only.split(",")]
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=110)
    outcomes = []
    for stage in stages:
        outcomes.append(run_stage(stage, options.out))
        console.print(f"{stage.name}: exit code {outcomes[-1].exit_code}, {outcomes[-1].seconds:.0f} s")
    found = {"machine": machine(torch.device(options.device)), "stages": [asdict(outcome) for outcome in outcomes]}
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(table(outcomes))
    return 0 if all(outcome.exit_code == 0 for outcome in outcomes) else 4


def all_stages(device: str, small: bool, out: Path) -> list[Stage]:
    """The stages in order; small ones take seconds each."""
    tests = Stage("tests", [*PYTHON, "pytest", "-m", "gpu", "-n", "0", "-rs"])
    return [*([tests] if device == "cuda" else []), *benchmarks(device, small, out), *trainings(device, small, out)]


def benchmarks(device: str, small: bool, out: Path) -> list[Stage]:
    """Each with its sizes, and the least ones."""
    sizes = {
        "solvers": ("--epochs 5", "--num-samples 16 --k 2 --tol 0.5 --epochs 1 --repeats 1 --solvers nostalgia"),
        "products": (
            "--model vit_b16 --num-samples 64",
            "--model vit_tiny --num-samples 8 --repeats 1 --methods hessian --precisions float32",
        ),
        **{
            f"step-{network}-{scope}": (
                f"--network {network} --{scope} --precision bf16 --batch-size 32 --steps 5",
                SMALL_STEP,
            )
            for network, scope in (("vit_s", "lora"), ("vit_b", "lora"), ("vit_b", "whole"), ("resnet50", "whole"))
        },
        "projection": ("--model vit_b16 --k 64", "--parameters 1000 --k 4 --repeats 1"),
        "pipeline": ("--num-images 2048", "--num-images 16 --image-size 32 --workers 0 --repeats 1"),
    }
    stages = []
    for name, pair in sizes.items():
        words = [*PYTHON, f"bench.{name.partition('-')[0]}", "--device", device, *pair[small].split()]
        stages.append(Stage(name, [*words, "--out", str(out / f"{name}.json")], writes_json=True))
    return stages


def trainings(device: str, small: bool, out: Path) -> list[Stage]:
    """Two ranks on the demo, and one on Fashion-MNIST, by three methods each."""
    accelerator = f"train.accelerator={'gpu' if device == 'cuda' else 'cpu'}"
    two = [*PYTHON, "torch.distributed.run", "--nproc_per_node", "2", "-m", "nostalgia.train", "--suite", "demo"]
    two += SMALL_RUN if small else []
    one = [*PYTHON, "nostalgia.train", *FASHION, *(SMALL_NETWORK if small else NETWORK)]
    several = device == "cuda" and torch.cuda.device_count() > 1
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    kinds = [
        ("ddp", two, hidden if several else ONE_CARD),
        ("fsdp", two, {"ACCELERATE_USE_FSDP": "true", **hidden}),
        ("real", one, {}),
    ]
    if device == "cuda" and not several:
        # gloo, which two ranks on one card need, has no FSDP2 on CUDA tensors.
        kinds = [kind for kind in kinds if kind[0] != "fsdp"]
    return [
        Stage(name, [*words, accelerator, f"method={method}", f"experiment.output_dir={out / name}"], environment)
        for kind, words, environment in kinds
        for method in ("nostalgia", "kronecker", "finetune")
        for name in [f"{kind}-{method}"]
    ]


PYTHON = [sys.executable, "-m"]
FASHION = ["dataset=fashion_mnist", "experiment.split=classes", "experiment.num_tasks=5"]
NETWORK = [
    "model=vit", "model.pretrained=false", "train.precision=bf16", "train.epochs=3", "train.warmup_epochs=0.5",
    "dataset.batch_size=64",
]  # fmt: skip
SMALL_STEP = "--network vit_tiny --batch-size 2 --steps 1 --repeats 1 --methods finetune,kronecker"
SMALL_RUN = ["train.epochs=1", "train.max_steps_per_epoch=2", "train.max_eval_batches=1", "experiment.export=false"]
SMALL_NETWORK = ["model=vit_tiny", *SMALL_RUN, "curvature.num_samples=16"]
ONE_CARD = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}


def run_stage(stage: Stage, out: Path) -> Outcome:
    """Run one stage; its output goes to ``out/<name>.log``."""
    started = time.monotonic()
    code: int | None = None
    with (out / f"{stage.name}.log").open("w") as log:
        try:
            done = subprocess.run(
                stage.words,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **stage.environment},
                timeout=TIMEOUT,
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            pass
    return Outcome(stage.name, " ".join(stage.words), code, time.monotonic() - started, _result(stage, out))


def _result(stage: Stage, out: Path) -> Any:
    if stage.writes_json:
        file = out / f"{stage.name}.json"
        return json.loads(file.read_text()) if file.is_file() else None
    found = sorted(out.glob(f"{stage.name}/*/results/results.json"))
    results = json.loads(found[-1].read_text()) if found else {}
    return {key: results[key] for key in RESULTS if key in results} or None


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row a stage; of runs, average accuracy and backward transfer."""
    shown = Table("stage", "exit code", "seconds", "accuracy", "backward transfer")
    for outcome in outcomes:
        measures = outcome.result if isinstance(outcome.result, dict) else {}
        numbers = [f"{measures[key]:.3f}" if measures.get(key) is not None else "" for key in ("acc", "bwt")]
        shown.add_row(outcome.name, str(outcome.exit_code), f"{outcome.seconds:.0f}", *numbers)
    return shown


if __name__ == "__main__":
    sys.exit(main())
