"""What cannot be run is refused on one rank and on two: one error line, its exit code, no hang, no traceback.

Without a launcher, so that rank 0 holds the group's store and takes it along when it ends; one case goes through it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from nostalgia.models import build_backbone
from nostalgia.models.export import _save_backbone
from tests.distributed.harness import ROOT, cpu_environment
from tests.ranks import run_train
from tests.unit.data.trees import png, write_tree

CLASSES = ("ant", "bee", "cat")
TINY = ("model=vit_tiny", "train.epochs=1", "dataset.num_workers=0")
DIGITS = ("dataset=digits", *TINY)
Build = Callable[[Path], list[str]]


def folder_of(change: Callable[[Path], object]) -> Build:
    """A folder of images on which ``change`` was made, as the data set."""

    def build(tmp: Path) -> list[str]:
        folder = write_tree(tmp / "animals", CLASSES)
        change(folder)
        return [f"dataset={folder}", *TINY]

    return build


def parquet(labels: list[int], names: int) -> Build:
    """A hub data set on disk whose label column promises ``names`` classes."""

    def build(tmp: Path) -> list[str]:
        rows = {"image": [{"bytes": png(i, 0), "path": None} for i in range(len(labels))], "label": labels}
        features = {"image": datasets.Image(), "label": datasets.Value("int64")}
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        info = table.info.copy()
        kinds = datasets.ClassLabel(names=[f"class{i}" for i in range(names)])
        info.features = datasets.Features({"image": datasets.Image(), "label": kinds})
        datasets.Dataset(table.data, info=info).save_to_disk(tmp / "saved")
        return [f"dataset={tmp / 'saved'}", *TINY]

    return build


def split_without_images(folder: Path) -> None:
    for path in (folder / "val").rglob("*.png"):
        path.unlink()


def without_code(tmp: Path) -> list[str]:
    """A repository in the hub's cache layout cannot be faked in a line; a local one with its own code can."""
    (tmp / "net").mkdir()
    (tmp / "net" / "config.json").write_text('{"model_type": "vit", "auto_map": {"AutoModel": "own.Net"}}')
    return ["dataset=digits", "model=vit", f"model.model_id={tmp / 'net'}"]


def half_weights(tmp: Path) -> list[str]:
    config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    _save_backbone(build_backbone(framework="hf", pretrained=False, config=config, image_size=32), tmp / "net")
    weights = tmp / "net" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    return ["dataset=digits", "model=vit", f"model.model_id={tmp / 'net'}"]


def junk(split: str) -> Build:
    return folder_of(lambda folder: sorted((folder / split / "bee").iterdir())[1].write_bytes(b"no image"))


def in_the_way(folder: Path) -> list[str]:
    (folder / "file").write_text("in the way")
    return [*DIGITS, f"experiment.output_dir={folder / 'file' / 'runs'}"]


def from_others(folder: Path) -> list[str]:
    (folder / "config.yaml").write_text("experiment: !!python/object/apply:os.system ['true']\n")
    return ["--config", str(folder / "config.yaml")]


# name: (words, exit code, what the line says)
CASES: dict[str, tuple[Build, int, str]] = {
    "unknown dataset": (lambda _: ["dataset=digts", *TINY], 2, "did you mean digits"),
    "unknown suite": (lambda _: ["--suite", "dem"], 2, "did you mean demo"),
    "unknown model": (lambda _: ["dataset=digits", "model=vitt"], 2, "did you mean vit"),
    "unknown key": (lambda _: [*DIGITS, "train.epoch=3"], 2, "did you mean train.epochs"),
    "unknown option": (lambda _: ["--suit", "demo"], 2, "did you mean --suite"),
    "no directions": (lambda _: [*DIGITS, "nostalgia.top_k=0"], 2, "method.top_k=0: allowed is"),
    "more directions than parameters": (
        lambda _: [*DIGITS, "nostalgia.top_k=99999999"], 2, "method.top_k=99999999: allowed 1 to",
    ),
    "no tasks": (lambda _: [*DIGITS, "experiment.tasks=[]"], 2, "experiment.tasks=[]: name at least one task"),
    "empty folder": (folder_of(lambda f: [shutil.rmtree(p) for p in f.iterdir()]), 3, "animals: empty"),
    "class missing from validation": (
        folder_of(lambda f: shutil.rmtree(f / "val" / "bee")), 3, "class 'bee' is missing from validation",
    ),
    "unreadable image": (junk("train"), 3, "bee"),
    "unreadable validation image": (junk("val"), 3, "not a readable image"),
    "output folder in the way": (in_the_way, 2, "cannot be written (Not a directory); name another folder"),
    "a name that leads out": (lambda _: [*DIGITS, "experiment.name=../x"], 2, "experiment.name='../x': allowed is"),
    "a configuration with code": (from_others, 2, "a tag (tag:yaml.org,2002:python"),
    "no such configuration": (lambda f: ["--config", str(f / "none.yaml")], 2, "no such file"),
    "contradictory": (lambda _: [*DIGITS, "nostalgia.k_max=3"], 2, "is below method.top_k"),
    "an optimizer without a metric": (
        lambda _: [*DIGITS, "train.optimizer=adafactor"], 2,
        "train.optimizer=adafactor with method.project=constrained: its metric is not known; allowed are adamw, sgd, lion",
    ),
    "another number of devices": (lambda _: [*DIGITS, "train.devices=3"], 2, "the launcher decides"),
    "missing data": (lambda tmp: ["dataset=cub200", *TINY], 3, "dataset cub200 was not found; tried"),
    "missing hub data": (lambda tmp: ["dataset=hf:user/none", *TINY], 3, "dataset none was not found"),
    "missing weights": (lambda tmp: ["dataset=digits", "model=vit"], 3, "not found; looked for a folder"),
    "missing torchvision weights": (lambda tmp: ["dataset=digits", "model=resnet18"], 3, "IMAGENET1K_V1 not found"),
    "partial weights": (half_weights, 3, "damaged"),
    "code of its own": (without_code, 2, "Python code of its own"),
    "number of classes": (
        lambda tmp: [f"dataset.root={write_tree(tmp / 'cifar10', CLASSES).parent}", "dataset=cifar10", *TINY],
        3, "3 classes where cifar10 has 10",
    ),
    "label out of range": (parquet([0, 0, 1, 1, 2, 2], 2), 3, "label 2 in column 'label' is out of range"),
    "split without images": (folder_of(split_without_images), 3, "class folder without an image"),
    "case": (folder_of(lambda f: shutil.copytree(f / "train" / "bee", f / "train" / "Bee")), 3, "differ only in case"),
    "link loop": (folder_of(lambda f: os.symlink(f / "train", f / "train" / "bee" / "up")), 3, "a loop; remove it"),
    "dots in a name": (lambda tmp: ["dataset=../secret", *TINY], 2, "no such folder"),
    "slash in a name": (lambda tmp: ["dataset=a/b", *TINY], 2, "no such folder"),
    "dots in a hub name": (lambda tmp: ["dataset=hf:../x", *TINY], 2, "allowed is hf:user/name"),
    "head of no task": (
        lambda tmp: ["experiment.tasks=[digits,{dataset: digits, head: task3_x}]", *TINY], 2, "is no earlier task",
    ),
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_is_refused(case: str, ranks: int, tmp_path: Path) -> None:
    build, code, message = CASES[case]
    words = ["--quiet", *build(tmp_path)]
    if not any(word.startswith("experiment.output_dir=") for word in words):
        words.append(f"experiment.output_dir={tmp_path / 'runs'}")
    started = time.monotonic()
    done = run_train(words, ranks, timeout=60, environment={"TORCH_HOME": str(tmp_path / "torch")})
    assert done.codes == [code] * ranks, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr
    assert "frame #" not in done.stderr  # nor one of C++
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mistake_in_a_method_of_the_users_is_named_and_ends_with_4(ranks: int, tmp_path: Path) -> None:
    words = [
        "dataset=digits",
        *TINY,
        "method=tests.faults.own_method:Failing",
        f"experiment.output_dir={tmp_path / 'runs'}",
    ]
    done = run_train(["--quiet", *words], ranks, timeout=60)
    assert done.codes == [4] * ranks, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "your own code failed at" in line
    assert "own_method.py, line 47: FileNotFoundError" in line


@pytest.mark.exhaustive
def test_the_launch_script_passes_the_code_on(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "launch" / "ddp.sh", "dataset=caltech256", *TINY, f"experiment.output_dir={tmp_path / 'runs'}"],
        cwd=tmp_path, env=cpu_environment(PATH=path, NPROC="2"), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "caltech256 was not found" in error
    assert "Traceback" not in done.stderr
