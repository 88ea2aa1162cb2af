"""A dry run lists every task, says how to get what is missing, and downloads nothing."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest
from accelerate import Accelerator

from nostalgia.config import parse
from nostalgia.errors import NotFoundError
from nostalgia.experiment.dry_run import dry_run
from nostalgia.experiment.info import run_info

SMALL = ("--dry-run", "--quiet", "--suite", "demo")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def show(*words: str) -> None:
    dry_run(parse([*SMALL, *words]), Accelerator(cpu=True), "32", run_info)


def test_everything_is_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show(f"experiment.output_dir={tmp_path / 'runs'}", "train.epochs=3")
    shown = capsys.readouterr().out
    assert "at most 48 directions of 69,056 numbers" in shown  # what the basis takes
    assert "task3_digits  found  1,438  359  10 outputs  45 x 3 = 135" in shown
    assert re.search(r"step +273 ", shown)  # as nostalgia.plan counts them: (23 + 23 + 45) x 3
    assert "1 GPU on 1 node, DDP, 32 images a GPU: fits" in shown
    assert not (tmp_path / "runs").exists()


def test_all_tasks_are_listed_where_some_are_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tasks = "[digits,cub200,{dataset: digits, head: task1_digits},mnist,{dataset: digits, head: task4_mnist},cub200]"
    with pytest.raises(NotFoundError, match="task2_cub200, task6_cub200, task4_mnist, task5_digits; above"):
        show(f"experiment.tasks={tasks}", f"dataset.root={tmp_path}")
    shown = capsys.readouterr().out
    for line in ("task1_digits  found", "task2_cub200  missing", "10 outputs of task1_digits", "task6_cub200  missing"):
        assert line in shown
    assert shown.count("dataset cub200 was not found") == 1  # once for both tasks
    assert f"unpack CUB_200_2011.tgz of data.caltech.edu/records/65de6-vp158 under {tmp_path}" in shown
    assert "it goes on with the head of task4_mnist" in shown
    assert "note: steps without those of task2_cub200," in shown  # in the plan
    assert "a dry run makes none; the run itself would try" in shown
    assert "at most 64 directions of 69,056 numbers" in shown  # of all tasks, k_max = 4 x 128
    assert list(tmp_path.iterdir()) == []


def test_what_only_looks_like_an_image_is_refused(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / part / name
            folder.mkdir(parents=True)
            (folder / "1.jpg").write_text(pointer)
    with pytest.raises(NotFoundError, match=r"pets/train/cat/1\.jpg"):
        show(f"experiment.tasks=[digits,{tmp_path / 'pets'}]")


def test_weights_that_are_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(NotFoundError, match="missing on this machine: the model's weights"):
        show("model.framework=torchvision", "model.arch=resnet18", "model.pretrained=true")
    shown = capsys.readouterr().out
    assert "get https://download.pytorch.org/models/resnet18" in shown
    assert "task3_digits  found" in shown
    assert list(tmp_path.iterdir()) == []
