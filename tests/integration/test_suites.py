"""Each suite and stream on real images, from data and weights on disk: layouts, networks, one process and two.

A few of the combinations run every time; ``pytest -m long`` runs them all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nostalgia import sweep
from nostalgia.config import parse
from nostalgia.config.compose import config_folder
from nostalgia.experiment.method_choice import complete_method
from nostalgia.models import build_backbone, load_heads
from nostalgia.models.export import _save_backbone
from nostalgia.utils.yaml_files import read_yaml
from tests.integration import many_runs
from tests.integration.suite_data import LAYOUTS, classes, write
from tests.ranks import run
from tests.unit.models.tiny import CONFIGS

SUITES = ("main", "robustness", "finegrained", "ablation")
# Streams cut from one data set: classes a task.
SPLITS = {"cifar100_10": 10, "cifar100_20": 5, "imagenet_r_10": 20, "cub200_10": 20, "split_fashion": 2}
STREAMS = (*SPLITS, "domainnet_6", "five_datasets", "rank_ablation", "glyphs")
FROM_SCRATCH = ("split_fashion", "glyphs")  # these bring a small network of their own
NETWORKS = ("vit", "deit_base_distilled", "resnet18")
# A run of seconds, debug or not: what is asked of the eigensolver is little, the network sees 32 pixels.
SMALL = (
    "--quiet", "dataset.batch_size=16", "dataset.num_workers=0", "dataset.download=false", "nostalgia.top_k=2",
    "nostalgia.max_basis=6", "nostalgia.curvature=ggn", "nostalgia.tol=0.3", "nostalgia.num_samples=16",
    "logger.tensorboard=false",
)  # fmt: skip
REAL = (
    "train.epochs=1", "train.warmup_epochs=0", "train.head_warmup_epochs=1", "train.precision=32",
    "train.max_steps_per_epoch=8", "train.max_eval_batches=4",
)  # fmt: skip
QUICK = (
    "method=finetune", "train.head_warmup_epochs=0", "train.max_steps_per_epoch=2", "train.max_eval_batches=1",
    "logger.report=false",
)  # fmt: skip

Root = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small networks in the forms pretrained ones come in: two Hugging Face folders and a state dict."""
    folder = tmp_path_factory.mktemp("weights")
    found = {}
    for name, kind in (("vit", "vit"), ("deit_base_distilled", "deit")):
        config = {"model_type": kind, **CONFIGS[kind], "image_size": 32}
        backbone = build_backbone(framework="hf", pretrained=False, config=config)
        _save_backbone(backbone, folder / name)
        found[name] = folder / name
    import torchvision.models

    torch.manual_seed(0)
    found["resnet18"] = folder / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), found["resnet18"])
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """``data(layout, suite)``: a root with the suite's data sets in a layout, each written once."""
    written: set[tuple[str, str]] = set()
    roots = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}

    def root(layout: str, suite: str) -> Path:
        config = parse(["--suite", suite]).config
        for name in config.experiment.tasks or [config.dataset.name]:
            if (layout, name) not in written:
                write(layout, roots[layout], name)
                written.add((layout, name))
        return roots[layout]

    return root


class Plan:
    """Command lines to run in one process or group, and where each leaves its results."""

    def __init__(self, folder: Path, weights: dict[str, Path], data: Root) -> None:
        self.folder, self.weights, self.data = folder, weights, data
        self.lines: list[tuple[str, list[str], str | None]] = []
        self.runs: list[Path] = []

    def train(self, suite: str, layout: str, network: str, *words: str) -> None:
        out = self.folder / f"{len(self.runs)}_{suite}_{layout}_{network}"
        self._add(suite, layout, network, f"experiment.output_dir={out}", *words)
        self.runs.append(out / "latest")

    def dry_run(self, suite: str, layout: str, network: str) -> None:
        self._add(suite, layout, network, "--dry-run")

    def _add(self, suite: str, layout: str, network: str, *words: str) -> None:
        root = self.data(layout, suite)
        size = ["dataset.image_size=32"] if network == "resnet18" else []
        model = [f"model={network}", f"model.model_id={self.weights[network]}", *size]
        line = ["--suite", suite, *(model if suite not in FROM_SCRATCH else []), f"dataset.root={root}", *SMALL, *words]
        self.lines.append(("train", line, str(root)))

    def evaluate(self, *words: str) -> None:
        """Measure the last run again."""
        self.lines.append(("evaluate", [str(self.runs[-1]), *words], None))

    def run(self, processes: int, timeout: float) -> None:
        environment = {"TORCH_HOME": str(self.folder / "torch")}
        done = run(many_runs.main, self.lines, world_size=processes, environment=environment, timeout=timeout)
        assert not any(done.codes), done.stdout[-4000:] + done.stderr[-4000:]
        assert done.stdout.count("finished: ") == len(self.lines) * processes
        print("\n".join(line[:120] for line in done.stdout.splitlines() if line.startswith("finished")))
        for folder in self.runs:
            check(folder)


def check(run: Path) -> None:
    """A whole run: every task's accuracy over its classes, an export beside it where one was asked for."""
    results = json.loads((run / "results" / "results.json").read_text())
    count = len(results["tasks"])
    assert [sum(a is not None for a in row) for row in results["accuracy_matrix"]] == list(range(1, count + 1))
    config = read_yaml(run / "config.yaml")
    for task, names in zip(results["tasks"], results["classes"], strict=True):
        assert len(names) == (SPLITS.get(config["experiment"]["name"]) or len(classes(task.partition("_")[2])))
    assert (run / "export" / "heads.safetensors").is_file() == config["experiment"]["export"]
    evaluation = run / "results" / "evaluation.json"
    if evaluation.is_file():
        found = json.loads(evaluation.read_text())
        assert found["same_as_run"] is True
        assert [t["accuracy"] for t in found["tasks"]] == results["accuracy_matrix"][-1]


@pytest.mark.exhaustive
@pytest.mark.timeout(600)  # tens of seconds on a machine of its own
def test_suites_on_one_process(tmp_path: Path, weights: dict[str, Path], data: Root) -> None:
    """Each layout and each network once, for three of the suites; measured again from the export."""
    plan = Plan(tmp_path, weights, data)
    plan.train("ablation", "torchvision", "resnet18", "--debug")
    plan.evaluate()
    plan.train("finegrained", "hub", "vit", *REAL, "train.max_steps_per_epoch=3")
    plan.evaluate()
    plan.train("robustness", "folders", "deit_base_distilled", "--debug")
    measured = tmp_path / "folder.json"
    plan.evaluate("--data", str(data("folders", "robustness") / "imagenet-a"), "--task", "3", "--output", str(measured))
    plan.run(1, timeout=580)
    (resnet, vit, deit) = plan.runs
    results = json.loads((deit / "results" / "results.json").read_text())
    (folder,) = json.loads(measured.read_text())["tasks"]
    assert (folder["task"], folder["accuracy"]) == ("task3_imagenet-a", results["accuracy_matrix"][2][2])
    assert len(folder["classes"]) == 200
    assert (vit / "export" / "adapters" / "adapter_config.json").is_file()
    assert (resnet / "export" / "norm_statistics.safetensors").is_file()


@pytest.mark.exhaustive
@pytest.mark.timeout(600)  # tens of seconds on a machine of its own
def test_streams(tmp_path: Path, weights: dict[str, Path], data: Root) -> None:
    """Each stream found by a dry run, and two steps of each of its tasks."""
    plan = Plan(tmp_path, weights, data)
    for suite in STREAMS:
        plan.dry_run(suite, "torchvision", "vit")
        plan.train(suite, "torchvision", "vit", *REAL, *QUICK)
    plan.run(1, timeout=580)


def test_ranks_are_swept(tmp_path: Path) -> None:
    """The command of rank_ablation's header: plain fine-tuning, and the projection alone at each rank."""
    text = (config_folder() / "suite" / "rank_ablation.yaml").read_text()
    (command,) = re.findall(r"^# Command +python -m nostalgia\.sweep (.*)$", text, re.MULTILINE)
    words = [*command.split(), f"experiment.output_dir={tmp_path}"]
    jobs = {
        cell.job.folder.relative_to(tmp_path).as_posix(): cell.job for cell in sweep.cells(sweep.read_options(words))
    }
    assert list(jobs) == ["finetune/seed0", *(f"nostalgia/strength_{k}/seed0" for k in (8, 24, 64))]
    config = parse(list(jobs["nostalgia/strength_24/seed0"].words)).config
    complete_method(config)
    assert (config.method["top_k"], config.method["tail"]) == (24, "none")


@pytest.mark.exhaustive
@pytest.mark.timeout(600)  # tens of seconds on a machine of its own
def test_a_head_that_goes_on(tmp_path: Path) -> None:
    """One head for two tasks, in turn, taken up again from the checkpoint, and jointly; measured from the export."""
    plan = Plan(tmp_path, {}, lambda layout, suite: tmp_path)
    entries = "[{dataset: digits, classes: [1, 2, 3]}, {dataset: digits, head: task1_digits}]"
    words = ["--debug", "--suite", "demo", f"experiment.tasks={entries}", *SMALL]
    for name, more in (("turn", []), ("joint", ["method=joint"])):
        plan.lines.append(("train", [*words, *more, f"experiment.output_dir={tmp_path / name}"], None))
        plan.lines.append(("evaluate", [str(tmp_path / name / "latest")], None))
    plan.lines.insert(1, ("train", ["--resume", str(tmp_path / "turn" / "latest")], None))
    plan.run(1, timeout=580)
    for name in ("turn", "joint"):
        run = tmp_path / name / "latest"
        heads = load_heads(run / "export" / "heads.safetensors")
        assert heads["task1_digits"].weight.shape[0] == 10
        assert torch.equal(heads["task1_digits"].weight, heads["task2_digits"].weight)
        assert json.loads((run / "results" / "evaluation.json").read_text())["same_as_run"] is True
        results = json.loads((run / "results" / "results.json").read_text())
        assert results["classes"] == [["1", "2", "3"], ["1", "2", "3", "0", *"456789"]]


@pytest.mark.exhaustive
@pytest.mark.timeout(600)  # tens of seconds on a machine of its own
def test_a_suite_on_two_processes(tmp_path: Path, weights: dict[str, Path], data: Root) -> None:
    plan = Plan(tmp_path, weights, data)
    plan.train("finegrained", "hub", "vit", "--debug")
    plan.evaluate()
    plan.run(2, timeout=580)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_suite(tmp_path: Path, weights: dict[str, Path], data: Root, layout: str, network: str) -> None:
    """Every suite in every layout with every network: --debug, and a real epoch of a few steps."""
    plan = Plan(tmp_path, weights, data)
    for suite in (*SUITES, *STREAMS):
        plan.train(suite, layout, network, "--debug")
        plan.train(suite, layout, network, *REAL)
        plan.evaluate()
    plan.run(1, timeout=7000)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_suites_on_two_processes(
    tmp_path: Path, weights: dict[str, Path], data: Root, layout: str, network: str
) -> None:
    """Every layout with every network; of the suites, one each time."""
    plan = Plan(tmp_path, weights, data)
    suite = SUITES[(list(LAYOUTS).index(layout) + NETWORKS.index(network)) % len(SUITES)]
    plan.train(suite, layout, network, "--debug")
    plan.evaluate()
    plan.run(2, timeout=7000)
