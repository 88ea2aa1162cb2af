"""Which method keeps most: a pretrained ViT with LoRA on real streams, strengths chosen on a stream that is not reported.

python -m bench.study OUT --weights FOLDER --glyphs FOLDER [--seeds 0,1,2,3,4] [--jobs 16] [--minutes M] [KEY=VALUE ...]

FOLDER of --weights is a pretrained ViT as `save_pretrained` leaves it, that of --glyphs what `python -m bench.glyphs` writes;
Fashion-MNIST and digits are found as in any run (dataset.root=...). Each method first runs over its strengths on the stream
CHOOSE with one seed; the one of the highest final accuracy is then run on the streams REPORT with all seeds. The line can be
given again: what is complete is not run again. OUT holds the runs, study.json (every run's figures, the strengths) and
study.md (the table: mean and standard error over seeds; `left` is the forgetting in per cent of fine-tuning's, `p` that of a
paired t test of the final accuracy against fine-tuning's).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp

from bench.forks import run_missing
from nostalgia.errors import NotFoundError
from nostalgia.reporting.results import read_results
from nostalgia.sweep_runner import Job

TRAINING = (
    "train.epochs=3", "train.max_steps_per_epoch=24", "dataset.batch_size=64", "train.lr=1e-3", "train.warmup_epochs=0.2",
    "train.head_warmup_epochs=0", "train.label_smoothing=0", "dataset.augment=none", "dataset.num_workers=0",
    "dataset.image_size=56", "curvature.kind=ggn", "curvature.num_samples=256", "curvature.solver=rows",
    "analysis.predict_forgetting=false", "analysis.captured_energy_samples=0",
    "experiment.export=false", "logger.tensorboard=false", "logger.report=false",
    "train.checkpoint_every_epochs=1000",
)  # fmt: skip
CHOOSING_SEED = 100
KEYS = ("acc", "bwt", "learning_accuracy", "memory_bytes", "seconds")


@dataclass(frozen=True)
class Arm:
    """A row of the table: a method, its options, and the strengths that are searched."""

    method: str
    words: tuple[str, ...] = ()
    option: str = "strength"
    grid: tuple[float, ...] = ()


ARMS = {
    "finetune": Arm("finetune"),
    "heads_only": Arm("heads_only"),
    "kronecker": Arm("kronecker", grid=(1, 10, 100, 1000)),
    "nostalgia": Arm("nostalgia", option="tail_strength", grid=(1, 10, 100, 1000)),
    "kronecker with anchor": Arm("kronecker", ("method.anchor=1",), grid=(1, 3, 10)),
    "projection alone": Arm("nostalgia", ("method.tail=none",), "top_k", (32, 128)),
    "ewc": Arm("ewc", grid=(1, 10, 100, 1000, 10000)),
    "ewc_lora": Arm("ewc_lora", grid=(1, 10, 100, 1000, 10000)),
    "lwf": Arm("lwf", grid=(0.1, 1, 10, 100)),
    "l2sp": Arm("l2sp", grid=(0.001, 0.01, 0.1, 1)),
    "gpm": Arm("gpm", option="threshold", grid=(0.9, 0.97, 0.99, 0.999)),
    "agem": Arm("agem", option="budget_bytes", grid=(100_000, 1_000_000, 10_000_000)),
}


def streams(glyphs: Path) -> dict[str, tuple[str, ...]]:
    """Words that set the tasks of each stream; the first is the one to choose on."""

    def glyph(script: str, first: int, count: int) -> str:
        classes = ", ".join(f"'{number:02d}'" for number in range(first, first + count))
        return f"{{dataset: {glyphs / script}, classes: [{classes}]}}"

    ten = [glyph(script, first, 4) for first in range(0, 20, 4) for script in ("cyrillic", "latin_lower")]
    four = [glyph("latin_lower", 0, 20), "fashion_mnist", glyph("cyrillic", 0, 20)]
    chosen_on = [glyph("greek", 0, 20), "digits", glyph("latin_upper", 0, 20), glyph("symbols", 0, 20)]
    return {
        "choose": (f"experiment.tasks=[{', '.join(chosen_on)}]",),
        "fashion in 5": ("dataset=fashion_mnist", "experiment.split=classes", "experiment.num_tasks=5"),
        # A task has 300 images: more epochs, for about as many steps as the others take.
        "glyphs in 10": (f"experiment.tasks=[{', '.join(ten)}]", "train.epochs=9"),
        "letters, clothes, letters": (f"experiment.tasks=[{', '.join(four)}]",),
    }


class Study:
    def __init__(self, options: argparse.Namespace, words: Sequence[str]) -> None:
        self.options = options
        self.streams = streams(options.glyphs.resolve())
        model = ("model=vit", f"model.model_id={options.weights.resolve()}")
        self.words = ("--quiet", *model, *TRAINING, *words)
        self.arms = {name: ARMS[name] for name in options.arms.split(",")}

    def job(self, stream: str, name: str, strength: float | None, seed: int) -> Job:
        arm = self.arms[name]
        words = [*self.words, *self.streams[stream], f"method={arm.method}", *arm.words, f"experiment.seed={seed}"]
        label = name
        if strength is not None:
            words.append(f"method.{arm.option}={strength:.12g}")
            label += f" {strength:g}"
        folder = self.options.out / f"{stream}/{label}/seed{seed}".replace(" ", "_").replace(",", "")
        return Job(f"{stream}: {label}, seed {seed}", folder, tuple(words), measures(folder) is not None)

    def choosing(self) -> Iterator[tuple[str, float | None, Job]]:
        for name, arm in self.arms.items():
            for strength in arm.grid or (None,):
                yield name, strength, self.job("choose", name, strength, CHOOSING_SEED)

    def chosen(self) -> dict[str, float | None]:
        """The strength of the highest final accuracy on the stream to choose on, of each arm that has a complete run."""
        best: dict[str, tuple[float, float | None]] = {}
        for name, strength, job in self.choosing():
            found = measures(job.folder)
            if found is not None and (name not in best or found["acc"] > best[name][0]):
                best[name] = found["acc"], strength
        return {name: strength for name, (_, strength) in best.items()}

    def reported(self, seeds: Sequence[int]) -> Iterator[tuple[str, str, int, Job]]:
        """Seed by seed, so that a study that is cut short has whole tables of fewer seeds."""
        chosen = self.chosen()
        for seed in seeds:
            for stream in list(self.streams)[1:]:
                for name, strength in chosen.items():
                    yield stream, name, seed, self.job(stream, name, strength, seed)


def measures(folder: Path) -> dict[str, Any] | None:
    """A run's figures, or None where it is not complete."""
    try:
        results = read_results(folder / "results")
    except NotFoundError:
        return None
    raw = json.loads((folder / "results" / "results.json").read_text())
    found = {key: raw[key] for key in KEYS}
    found["class_incremental"] = (raw.get("class_incremental") or {}).get("acc")
    found["overhead_seconds"] = raw["overhead_seconds"]
    found["accuracy_matrix"] = raw["accuracy_matrix"]
    found["device"], found["precision"] = results.details.get("device"), results.details.get("precision")
    return found


def summary(study: Study, seeds: Sequence[int]) -> dict[str, Any]:
    choice = [
        {"arm": name, "strength": strength, **(measures(job.folder) or {"failed": str(job.log)})}
        for name, strength, job in study.choosing()
    ]
    runs = [
        {"stream": stream, "arm": name, "seed": seed, **(measures(job.folder) or {"failed": str(job.log)})}
        for stream, name, seed, job in study.reported(seeds)
    ]
    return {"words": study.words, "chosen": study.chosen(), "choice": choice, "runs": runs}


def table(found: dict[str, Any]) -> str:
    """Markdown, a part a stream; over the seeds that an arm and fine-tuning have both."""
    lines = []
    done = [run for run in found["runs"] if "acc" in run]
    for stream in dict.fromkeys(run["stream"] for run in done):
        here = {(run["arm"], run["seed"]): run for run in done if run["stream"] == stream}
        lines += [
            f"\n**{stream}**\n",
            "| method | strength | seeds | ACC | BWT | LA | left | class-inc. | MB | s | extra s | p |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|---|---|---|")
        for arm, strength in found["chosen"].items():
            seeds = [seed for name, seed in here if name == arm and ("finetune", seed) in here]
            if seeds:
                lines.append(
                    _row(arm, strength, [here[arm, seed] for seed in seeds], [here["finetune", s] for s in seeds])
                )
    return "\n".join(lines).lstrip() + "\n"


def _row(arm: str, strength: float | None, runs: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> str:
    def shown(key: str) -> str:
        values = [run[key] for run in runs]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return f"{statistics.mean(values):.3f} ± {error:.3f}"

    left = 100 * sum(run["bwt"] for run in runs) / sum(run["bwt"] for run in plain)
    extra = statistics.mean(sum(run["overhead_seconds"].values()) for run in runs)
    cells = [
        arm, "" if strength is None else f"{strength:g}", str(len(runs)), shown("acc"), shown("bwt"),
        shown("learning_accuracy"), f"{round(left) or 0} %", f"{statistics.mean(run['class_incremental'] for run in runs):.3f}",
        f"{statistics.mean(run['memory_bytes'] for run in runs) / 1e6:.1f}",
        f"{statistics.mean(run['seconds'] for run in runs):.0f}", f"{extra:.1f}", _p_value(runs, plain),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _p_value(runs: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> str:
    """Of a two-sided paired t test over seeds of the final accuracy against fine-tuning's."""
    differences = [run["acc"] - other["acc"] for run, other in zip(runs, plain, strict=True)]
    if len(set(differences)) < 2:
        return ""
    return f"{ttest_1samp(differences, 0.0).pvalue:.2g}"


def main(arguments: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=about)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="a pretrained ViT's folder")
    parser.add_argument("--glyphs", type=Path, required=True, help="what python -m bench.glyphs wrote")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--arms", default=",".join(ARMS), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="start no run after that")
    options, words = parser.parse_known_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    seeds = [int(seed) for seed in options.seeds.split(",")]
    study = Study(options, words)
    run_missing([job for *_, job in study.choosing()], options.jobs, until)
    run_missing([job for *_, job in study.reported(seeds)], options.jobs, until)
    found = summary(study, seeds)
    (options.out / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "study.md").write_text(table(found))
    print(table(found))
    failed = [run["failed"] for run in [*found["choice"], *found["runs"]] if "failed" in run]
    if failed:
        print(f"{len(failed)} runs are not complete, first {failed[0]}", file=sys.stderr)
    return 4 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
