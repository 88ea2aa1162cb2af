"""What cannot be run is refused on the command line of two ranks: one error, exit code 2 or 3, no hang, no traceback.

A process start takes longer than all the rest: ``pytest -m long``. Unit tests hold each refusal where it is made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from nostalgia.models import build_backbone
from nostalgia.models.export import _save_backbone
from tests.distributed.harness import ROOT, cpu_environment
from tests.unit.data.trees import png, write_tree

CLASSES = ("ant", "bee", "cat")
Build = Callable[[Path], list[str]]


def folder_of(change: Callable[[Path], object]) -> Build:
    """A folder of images on which ``change`` was made, as the data set."""

    def build(tmp: Path) -> list[str]:
        folder = write_tree(tmp / "animals", CLASSES)
        change(folder)
        return [f"dataset={folder}"]

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
        return [f"dataset={tmp / 'saved'}"]

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


TINY = ["model=vit_tiny"]
CASES: dict[str, tuple[Build, int, str]] = {
    "missing data": (lambda tmp: ["dataset=cub200", *TINY], 3, "dataset cub200 was not found; tried"),
    "missing hub data": (lambda tmp: ["dataset=hf:user/none", *TINY], 3, "dataset none was not found"),
    "missing weights": (lambda tmp: ["dataset=digits", "model=vit"], 3, "not found; looked for a folder"),
    "missing torchvision weights": (lambda tmp: ["dataset=digits", "model=resnet18"], 3, "IMAGENET1K_V1 not found"),
    "partial weights": (half_weights, 3, "damaged"),
    "code of its own": (without_code, 2, "Python code of its own"),
    "corrupt image": (
        folder_of(lambda f: next((f / "train" / "bee").iterdir()).write_bytes(b"junk")), 3, "not a readable image",
    ),
    "corrupt validation image": (
        folder_of(lambda f: next((f / "val" / "bee").iterdir()).write_bytes(b"junk")), 3, "not a readable image",
    ),
    "number of classes": (
        lambda tmp: [f"dataset.root={write_tree(tmp / 'cifar10', CLASSES).parent}", "dataset=cifar10", *TINY],
        3, "3 classes where cifar10 has 10",
    ),
    "label out of range": (parquet([0, 0, 1, 1, 2, 2], 2), 3, "label 2 in column 'label' is out of range"),
    "split without images": (folder_of(split_without_images), 3, "class folder without an image"),
    "no images at all": (folder_of(lambda f: [shutil.rmtree(p) for p in f.iterdir()]), 3, "empty"),
    "case": (folder_of(lambda f: shutil.copytree(f / "train" / "bee", f / "train" / "Bee")), 3, "differ only in case"),
    "link loop": (folder_of(lambda f: os.symlink(f / "train", f / "train" / "bee" / "up")), 3, "a loop; remove it"),
    "dots in a name": (lambda tmp: ["dataset=../secret", *TINY], 2, "no such folder"),
    "slash in a name": (lambda tmp: ["dataset=a/b", *TINY], 2, "no such folder"),
    "dots in a hub name": (lambda tmp: ["dataset=hf:../x", *TINY], 2, "allowed is hf:user/name"),
    "unknown name": (lambda tmp: ["dataset=cifar", *TINY], 2, "did you mean cifar10?"),
    "head of no task": (
        lambda tmp: ["experiment.tasks=[digits,{dataset: digits, head: task3_x}]", *TINY], 2, "is no earlier task",
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", list(CASES))
def test_refused_on_two_ranks(tmp_path: Path, case: str) -> None:
    build, code, message = CASES[case]
    words = build(tmp_path)
    if not any(word.startswith("model=") for word in words):
        words += TINY
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / "launch" / "ddp.sh", "--debug", "--quiet", "dataset.num_workers=1", *words,
         f"experiment.output_dir={tmp_path / 'runs'}"],
        cwd=tmp_path,
        env=cpu_environment(PATH=path, HF_HOME=str(tmp_path / "hf"), TORCH_HOME=str(tmp_path / "torch"), NPROC="2"),
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
