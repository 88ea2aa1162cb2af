"""Which method keeps most: a pretrained ViT with LoRA on real streams, strengths chosen on a stream that is not reported.

python -m bench.study OUT --weights FOLDER --glyphs FOLDER [--seeds 0,1,2,3,4] [--jobs 16] [--minutes M] [KEY=VALUE ...]

FOLDER of --weights is a pretrained ViT as `save_pretrained` leaves it, that of --glyphs what `python -m bench.glyphs` writes;
Fashion-MNIST and digits are found as in any run (dataset.root=...). Each method first runs over its strengths on two streams
of their own, a short and a long one (or on the one that --streams names), with one seed; that of the highest mean final
accuracy is then run on the other streams with all seeds (none with --seeds ""). With --chosen FILE the strengths are those of
an earlier study.json, and none is chosen anew: more seeds of the same table. The line can be given again: what is complete is
not run again. OUT holds the runs, study.json (every run's figures, the strengths) and study.md (the table: mean and standard
error over seeds; `left` is the forgetting in per cent of fine-tuning's, `p` that of a paired t test of the final accuracy
against fine-tuning's).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp
from transformers import AutoModel

from bench.forks import run_missing
from nostalgia.errors import NotFoundError
from nostalgia.logging.results import read_results
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
CHOOSING_STREAMS = ("choose on four tasks", "choose on ten tasks")
KEYS = ("acc", "bwt", "learning_accuracy", "memory_bytes", "seconds")
FRESH = "model.lora.merge=task"
SAME = "model.lora.merge=never"

Candidate = Mapping[str, float]


@dataclass(frozen=True)
class Arm:
    """A row of the table: a method, words of all its runs, and the values searched of its options and of train's."""

    method: str
    words: tuple[str, ...] = ()
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def candidates(self) -> list[Candidate]:
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def shown(candidate: Candidate) -> str:
    return " ".join(f"{option}={value:g}" for option, value in candidate.items())


PREDICTED = "analysis.predict_forgetting=true"
ARMS = {
    "finetune": Arm("finetune", (SAME,)),
    "heads_only": Arm("heads_only", (SAME,)),
    "nostalgia": Arm("nostalgia", (FRESH,), {"tail_strength": (3, 10), "tail_temperature": (4, 8)}),
    "kronecker": Arm("kronecker", (FRESH, PREDICTED), {"strength": (3, 10, 30), "temperature": (4, 8)}),
    "kronecker, one pair a layer": Arm(
        "kronecker", (FRESH, "method.budget_bytes=0"), {"strength": (3, 10, 30), "temperature": (4,)}
    ),
    "projection": Arm("nostalgia", (SAME, "method.tail=none"), {"top_k": (32, 128)}),
    "ewc": Arm("ewc", (SAME,), {"strength": (10, 100, 1000, 10000)}),
    "ewc_lora": Arm("ewc_lora", (), {"strength": (1, 10, 100, 1000)}),
    "lwf": Arm("lwf", (SAME,), {"strength": (0.1, 1, 10, 100)}),
    "lwf, fresh": Arm("lwf", (FRESH,), {"strength": (0.1, 1, 10, 100)}),
    "gpm": Arm("gpm", (SAME,), {"threshold": (0.8, 0.9, 0.97, 0.99)}),
    "l2sp": Arm("l2sp", (SAME,), {"strength": (0.001, 0.01, 0.1, 1)}),
    "agem": Arm("agem", (SAME,), {"budget_bytes": (1_000_000, 10_000_000, 100_000_000)}),
}
# The whole network trained, without adapters: a ViT at a tenth of the rate, or a ResNet (--model resnet18).
WHOLE = ("model.use_lora=false", "train.lr=1e-4")
HEAD_RATE = "train.head_lr=3e-3"
WHOLE_ARMS = {
    "finetune, whole": Arm("finetune", WHOLE),
    "heads_only, whole": Arm("heads_only", WHOLE),
    "kronecker, whole": Arm("kronecker", WHOLE, {"strength": (1, 10, 30, 100, 300), "temperature": (4,)}),
    "kronecker and anchor, whole": Arm(
        "kronecker", WHOLE, {"strength": (10, 30), "temperature": (4,), "anchor": (1, 2, 4)}
    ),
    # The rate that a pretrained backbone bears is too little for a head that begins anew.
    "finetune, whole, head's rate": Arm("finetune", (*WHOLE, HEAD_RATE), {"lr": (3e-5, 1e-4)}),
    "heads_only, head's rate": Arm("heads_only", (*WHOLE, HEAD_RATE)),
    "kronecker and anchor, whole, head's rate": Arm(
        "kronecker",
        (*WHOLE, HEAD_RATE),
        {"lr": (3e-5,), "strength": (10, 3, 1), "temperature": (4,), "anchor": (0.5, 1)},
    ),
    "kronecker, whole, head's rate": Arm(
        "kronecker", (*WHOLE, HEAD_RATE), {"lr": (3e-5,), "strength": (1, 10), "temperature": (4,)}
    ),
    "lwf, whole, head's rate": Arm("lwf", (*WHOLE, HEAD_RATE), {"lr": (3e-5,), "strength": (0.5,)}),
}
# The search before: what temperature, an anchor and fresh adapters change.
PENALTY = (3, 10, 30, 100, 300)
VARIANTS = {
    **{f"kronecker T={T}": Arm("kronecker", (SAME,), {"strength": PENALTY, "temperature": (T,)}) for T in (1, 2, 4)},
    "kronecker T=4 fresh adapters": Arm("kronecker", (FRESH,), {"strength": PENALTY, "temperature": (4,)}),
    "projection, fresh": Arm("nostalgia", (FRESH, "method.tail=none"), {"top_k": (32, 128)}),
    "kronecker T=4 anchor": Arm(
        "kronecker", (SAME, "method.anchor=1"), {"strength": PENALTY[:-1], "temperature": (4,)}
    ),
}


# The learning rate is searched too: what forgets less may bear, or need, another one. First the rate, then at it the strength.
RATES = (1e-3, 2e-3, 4e-3)
RATED = {
    "finetune, own rate": Arm("finetune", (SAME,), {"lr": RATES}),
    "nostalgia, own rate": Arm("nostalgia", (FRESH,), {"tail_strength": (10,), "lr": RATES}),
    "nostalgia, own rate and strength": Arm("nostalgia", (FRESH,), {"tail_strength": (1, 3, 10), "lr": (2e-3,)}),
    "lwf, fresh, own rate": Arm("lwf", (FRESH,), {"strength": (1,), "lr": RATES}),
    "finetune, fresh, 2e-3": Arm("finetune", (FRESH,), {"lr": (2e-3,)}),
    "heads_only, own rate": Arm("heads_only", (SAME,), {"lr": RATES}),
    "nostalgia, path": Arm("nostalgia", (FRESH, "method.path=auto"), {"tail_strength": (3,), "lr": (2e-3,)}),
    # At the rate that was best for each of the above, the strengths beside the one that 1e-3 chose.
    "ewc, 2e-3": Arm("ewc", (SAME,), {"strength": (100, 1000, 10000), "lr": (2e-3,)}),
    "ewc_lora, 2e-3": Arm("ewc_lora", (), {"strength": (10, 100, 1000), "lr": (2e-3,)}),
    "gpm, 2e-3": Arm("gpm", (SAME,), {"threshold": (0.8, 0.9, 0.97), "lr": (2e-3,)}),
    "l2sp, 2e-3": Arm("l2sp", (SAME,), {"strength": (0.001, 0.01, 0.1), "lr": (2e-3,)}),
    "agem, 2e-3": Arm("agem", (SAME,), {"budget_bytes": (10_000_000,), "lr": (2e-3,)}),
}

# What the number of samples, the draws, the length of training and the optimizer change.
BASE = {"strength": (3,), "lr": (2e-3,)}
SETTINGS = {
    "kronecker, samples": Arm("kronecker", (FRESH,), {**BASE, "num_samples": (64, 256, 1024)}),
    "kronecker, draws": Arm("kronecker", (FRESH,), {**BASE, "draws": (1, 16)}),
    "finetune, length": Arm("finetune", (SAME,), {"lr": (2e-3,), "epochs": (1,)}),
    "kronecker, length": Arm("kronecker", (FRESH,), {**BASE, "epochs": (1,)}),
    "finetune, SGD": Arm("finetune", (SAME, "train.optimizer=sgd"), {"lr": (0.1,)}),
    "kronecker, SGD": Arm("kronecker", (FRESH, "train.optimizer=sgd"), {"strength": (3,), "lr": (0.1,)}),
}
OF_TRAINING = ("lr", "epochs")  # options of a grid that are not the method's


def streams(glyphs: Path) -> dict[str, tuple[str, ...]]:
    """Words that set the tasks of each stream; the first two are those to choose on."""

    def glyph(script: str, first: int, count: int) -> str:
        classes = ", ".join(f"'{number:02d}'" for number in range(first, first + count))
        return f"{{dataset: {glyphs / script}, classes: [{classes}]}}"

    def ten(*scripts: str) -> tuple[str, str]:
        # A task has 300 images: more epochs, for about as many steps as the others take.
        tasks = [glyph(script, first, 4) for first in range(0, 20, 4) for script in scripts]
        return f"experiment.tasks=[{', '.join(tasks)}]", "train.epochs=9"

    four = [glyph("latin_lower", 0, 20), "fashion_mnist", glyph("cyrillic", 0, 20)]
    chosen_on = [glyph("greek", 0, 20), "digits", glyph("latin_upper", 0, 20), glyph("symbols", 0, 20)]
    return {
        CHOOSING_STREAMS[0]: (f"experiment.tasks=[{', '.join(chosen_on)}]",),
        CHOOSING_STREAMS[1]: ten("greek", "latin_upper"),
        "fashion in 5": ("dataset=fashion_mnist", "experiment.split=classes", "experiment.num_tasks=5"),
        "glyphs in 10": ten("cyrillic", "latin_lower"),
        "letters, clothes, letters": (f"experiment.tasks=[{', '.join(four)}]",),
    }


class Study:
    def __init__(self, options: argparse.Namespace, words: Sequence[str]) -> None:
        self.options = options
        self.streams = streams(options.glyphs.resolve())
        model = (f"model={options.model}", f"model.model_id={options.weights.resolve()}")
        self.words, self.last = ("--quiet", *model, *TRAINING), tuple(words)
        known = {**ARMS, **WHOLE_ARMS, **VARIANTS, **RATED, **SETTINGS}
        self.arms = {name: known[name] for name in options.arms.split(";")}
        wanted = options.streams.split(";") if options.streams else list(self.streams)
        if odd := set(wanted) - set(self.streams):
            raise SystemExit(f"--streams: {', '.join(sorted(odd))}: allowed are {'; '.join(self.streams)}")
        self.choose_on = [stream for stream in CHOOSING_STREAMS if stream in wanted]
        self.report_on = [stream for stream in wanted if stream not in CHOOSING_STREAMS]
        if not self.choose_on and options.chosen is None:
            raise SystemExit(f"--streams: name one to choose on ({'; '.join(CHOOSING_STREAMS)}), or give --chosen FILE")

    def job(self, stream: str, name: str, candidate: Candidate, seed: int) -> Job:
        arm = self.arms[name]
        words = [*self.words, *self.streams[stream], f"method={arm.method}", *arm.words, f"experiment.seed={seed}"]
        sections = {key: "train" if key in OF_TRAINING else "method" for key in candidate}
        words += [f"{sections[key]}.{key}={value:.12g}" for key, value in candidate.items()]
        words += self.last
        label = f"{name} {shown(candidate)}".strip()
        folder = self.options.out / f"{stream}/{label}/seed{seed}".replace(" ", "_").replace(",", "")
        return Job(f"{stream}: {label}, seed {seed}", folder, tuple(words), measures(folder) is not None)

    def choosing(self) -> Iterator[tuple[str, Candidate, list[Job]]]:
        """Each arm with each of its candidates, and its runs on the streams to choose on; none where an earlier study chose."""
        if self.options.chosen is not None:
            return
        for name, arm in self.arms.items():
            for candidate in arm.candidates():
                yield name, candidate, [self.job(s, name, candidate, CHOOSING_SEED) for s in self.choose_on]

    def chosen(self) -> dict[str, Candidate]:
        """The options of the highest mean final accuracy on the streams to choose on, of each arm with complete runs."""
        if self.options.chosen is not None:
            earlier = json.loads(self.options.chosen.read_text())["chosen"]
            return {name: earlier[name] for name in self.arms}
        best: dict[str, tuple[float, Candidate]] = {}
        for name, candidate, jobs in self.choosing():
            found = [measures(job.folder) for job in jobs]
            mean = statistics.fmean(run["acc"] if run is not None else -math.inf for run in found)
            if mean > (best[name][0] if name in best else -math.inf):
                best[name] = mean, candidate
        return {name: candidate for name, (_, candidate) in best.items()}

    def reported(self, seeds: Sequence[int]) -> Iterator[tuple[str, str, int, Job]]:
        """Seed by seed, so that a study that is cut short has whole tables of fewer seeds."""
        chosen = self.chosen()
        for seed in seeds:
            for stream in self.report_on:
                for name, candidate in chosen.items():
                    yield stream, name, seed, self.job(stream, name, candidate, seed)


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
    prediction = folder / "results" / "forgetting_prediction.json"
    if prediction.exists():
        found["prediction_rows"] = [
            [row["measured"], row["predicted"]] for row in json.loads(prediction.read_text())["rows"]
        ]
    found["device"], found["precision"] = results.details.get("device"), results.details.get("precision")
    return found


def summary(study: Study, seeds: Sequence[int]) -> dict[str, Any]:
    choice = [
        {"stream": stream, "arm": name, "options": candidate, **(measures(job.folder) or {"failed": str(job.log)})}
        for name, candidate, jobs in study.choosing()
        for stream, job in zip(study.choose_on, jobs, strict=True)
    ]
    runs = [
        {"stream": stream, "arm": name, "seed": seed, **(measures(job.folder) or {"failed": str(job.log)})}
        for stream, name, seed, job in study.reported(seeds)
    ]
    return {"words": (*study.words, *study.last), "chosen": study.chosen(), "choice": choice, "runs": runs}


def table(found: dict[str, Any]) -> str:
    """Markdown, a part a stream; over the seeds that an arm and fine-tuning, the first arm, have both."""
    lines = []
    done = [run for run in found["runs"] if "acc" in run]
    plain = next(iter(found["chosen"]), "")
    for stream in dict.fromkeys(run["stream"] for run in done):
        here = {(run["arm"], run["seed"]): run for run in done if run["stream"] == stream}
        lines += [
            f"\n**{stream}**\n",
            "| method | options | seeds | ACC | BWT | LA | left | class-inc. | MB | s | extra s | p |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|---|---|---|")
        for arm, candidate in found["chosen"].items():
            seeds = [seed for name, seed in here if name == arm and (plain, seed) in here]
            if seeds:
                lines.append(_row(arm, candidate, [here[arm, s] for s in seeds], [here[plain, s] for s in seeds]))
    return "\n".join(lines).lstrip() + "\n"


def choice_table(found: dict[str, Any]) -> str:
    """Markdown: what was chosen from, one run a stream."""
    runs = {(run["arm"], shown(run["options"]), run["stream"]): run for run in found["choice"]}
    streams, first = list(dict.fromkeys(run["stream"] for run in found["choice"])), found["choice"][0]["arm"]
    plain_options = shown(found.get("chosen", {}).get(first, {}))
    lines = [
        f"| method | options | {' | '.join(f'{s}: ACC | BWT | LA | left' for s in streams)} |",
        "|" + (2 + 4 * len(streams)) * "---|",
    ]
    for arm, options in dict.fromkeys((arm, options) for arm, options, _ in runs):
        cells = [arm, options]
        for stream in streams:
            run, plain = runs[arm, options, stream], runs[first, plain_options, stream]
            cells += [f"{run[key]:.3f}" for key in ("acc", "bwt", "learning_accuracy")]
            cells.append(f"{round(100 * run['bwt'] / plain['bwt']) or 0} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def overview(found: dict[str, Any]) -> str:
    """Markdown: final and learning accuracy, forgetting left of each arm on every stream, over seeds shared with the first."""
    runs = [run for run in found["runs"] if "acc" in run]
    streams, plain = list(dict.fromkeys(run["stream"] for run in runs)), next(iter(found["chosen"]))
    lines = [
        "| method | " + " | ".join(f"{s}: ACC | LA | left" for s in streams) + " |",
        "|---" * (1 + 3 * len(streams)) + "|",
    ]
    for arm in found["chosen"]:
        cells = [arm]
        for stream in streams:
            here = {(run["arm"], run["seed"]): run for run in runs if run["stream"] == stream}
            seeds = [seed for name, seed in here if name == arm and (plain, seed) in here]
            if not seeds:
                cells += ["-"] * 3
                continue
            left = 100 * sum(here[arm, s]["bwt"] for s in seeds) / sum(here[plain, s]["bwt"] for s in seeds)
            cells += [
                f"{statistics.mean(here[arm, s][key] for s in seeds):.3f}" for key in ("acc", "learning_accuracy")
            ]
            cells.append(f"{round(left) or 0} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _row(arm: str, candidate: Candidate, runs: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> str:
    def mean(key: str) -> str:
        values = [run[key] for run in runs]
        spread = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    left = 100 * sum(run["bwt"] for run in runs) / sum(run["bwt"] for run in plain)
    extra = statistics.mean(sum(run["overhead_seconds"].values()) for run in runs)
    cells = [
        arm, shown(candidate), str(len(runs)), mean("acc"), mean("bwt"),
        mean("learning_accuracy"), f"{round(left) or 0} %", f"{statistics.mean(run['class_incremental'] for run in runs):.3f}",
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
    parser.add_argument("--weights", type=Path, required=True, help="a pretrained network's folder")
    parser.add_argument("--model", default="vit", help="of configs/model (default %(default)s)")
    parser.add_argument("--glyphs", type=Path, required=True, help="what python -m bench.glyphs wrote")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="reported (default %(default)s)")
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by semicolons; default: %(default)s")
    parser.add_argument("--streams", help="to choose and to report on, separated by semicolons (default: all)")
    parser.add_argument("--chosen", type=Path, metavar="FILE", help="take the strengths of this study.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default %(default)s)")
    parser.add_argument("--minutes", type=float, help="start no run after that")
    options, words = parser.parse_known_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if (options.weights / "config.json").exists():
        AutoModel.from_pretrained(options.weights)  # imports its module, which the forks then have
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    seeds = [int(seed) for seed in options.seeds.split(",") if seed]
    study = Study(options, words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # what is complete is summed up all the same
    try:
        run_missing([job for *_, jobs in study.choosing() for job in jobs], options.jobs, until, keep=("results",))
        run_missing([job for *_, job in study.reported(seeds)], options.jobs, until, keep=("results",))
    finally:
        found = summary(study, seeds)
        (options.out / "study.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / "study.md").write_text(table(found))
        print(table(found), flush=True)
    failed = [run["failed"] for run in [*found["choice"], *found["runs"]] if "failed" in run]
    if failed:
        print(f"{len(failed)} runs are not complete, first {failed[0]}", file=sys.stderr)
    return 4 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
