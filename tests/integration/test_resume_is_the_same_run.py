"""A run that goes on is the run that stopped, or says why not: data, words, precision, files of other runs."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from nostalgia.config import parse
from nostalgia.errors import NotFoundError, RunFailedError, UsageError
from nostalgia.experiment import run as whole_run
from nostalgia.experiment.experiment import Experiment
from nostalgia.parallel.accelerator import launch_info, make_accelerator
from tests.distributed.cases_training import forget_accelerate

IMAGES = 12  # a class


class Broken(RunFailedError):
    """What ends a run before its time, whose checkpoint is written to the end."""


def run(*words: str, precision: str = "32") -> None:
    request = parse([*words])
    try:
        whole_run.run(request, make_accelerator(launch_info("cpu"), precision), precision)
    finally:
        forget_accelerate()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes of small images, three of each held out by name."""
    generator = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 3)):
        for name in ("ant", "bee"):
            folder = tmp_path / "pics" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "pics"


@pytest.fixture
def words(tmp_path: Path, data: Path) -> list[str]:
    return [
        "--quiet", f"experiment.tasks=[{data},{data}]", "model=vit_tiny", "model.config.num_hidden_layers=1",
        "train.epochs=1", "train.accelerator=cpu", "dataset.batch_size=8", "dataset.num_workers=0", "method=finetune",
        "experiment.export=false", "logger.report=false", "train.head_warmup_epochs=0",
    ]  # fmt: skip


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]) -> Path:
    """A run that ended while its second task was evaluated."""
    evaluate = Experiment._evaluate

    def evaluate_once(self: Experiment, tasks: list) -> None:
        if tasks[0].index == 2:
            raise Broken
        evaluate(self, tasks)

    monkeypatch.setattr(Experiment, "_evaluate", evaluate_once)
    with pytest.raises(Broken):
        run(*words, f"logger.save_dir={tmp_path / 'logs'}", "--run-dir", str(tmp_path / "one"))
    monkeypatch.undo()
    return tmp_path / "one"


def test_it_goes_on_without_a_false_warning(broken: Path) -> None:
    """And with the precision that auto became, in absolute paths."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        run("--resume", str(broken), "--quiet")
    assert not [one for one in raised if "lr_scheduler" in str(one.message)]
    assert (broken / "results" / "results.json").is_file()
    config = yaml.safe_load((broken / "config.yaml").read_text())
    assert config["train"]["precision"] == "32"
    assert Path(config["dataset"]["root"]).is_absolute()


@pytest.mark.parametrize(("split", "called"), [("train", "training"), ("val", "validation")])
def test_images_that_were_added_or_removed_are_named(broken: Path, data: Path, split: str, called: str) -> None:
    (data / split / "ant" / "1.png").unlink()
    shutil.copy(data / split / "bee" / "0.png", data / split / "ant" / "new.png")
    with pytest.raises(
        NotFoundError, match=rf"its {called} images are not those the run began with: 1 new .*; 1 gone \(ant/1\.png\)"
    ):
        run("--resume", str(broken), "--quiet")
    run("--resume", str(broken), "--quiet", "--resume-override")
    assert (broken / "results" / "results.json").is_file()


def test_words_beside_a_resume_are_refused_taken_or_said_to_be_ignored(
    broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.yaml says what runs."""
    before = yaml.safe_load((broken / "config.yaml").read_text())
    with pytest.raises(UsageError, match=r"train\.lr was .*, is 1\.0: this would not be the same run"):
        run("--resume", str(broken), "--quiet", "train.lr=1")
    with pytest.raises(UsageError, match=r"the run was begun in train\.precision=32, here it would go on in 64"):
        run("--resume", str(broken), "--quiet", precision="64")
    assert yaml.safe_load((broken / "config.yaml").read_text()) == before
    run("--resume", str(broken), "--quiet", "train.log_every_n_steps=3", "dataset.batch_size=4")
    output = capsys.readouterr()
    assert "dataset.batch_size=4 is ignored: 8 a device keeps" in output.out + output.err
    after = yaml.safe_load((broken / "config.yaml").read_text())
    assert (after["train"]["log_every_n_steps"], after["dataset"]["batch_size"]) == (3, 8)


def test_files_of_another_run_in_the_same_folder_of_logs_stay(broken: Path, tmp_path: Path, words: list[str]) -> None:
    run(*words, f"logger.save_dir={tmp_path / 'logs'}", "--run-dir", str(tmp_path / "two"))
    logs = {path: path.read_bytes() for path in (tmp_path / "logs").rglob("*tfevents*")}
    run("--resume", str(broken), "--quiet")
    others = [path for path in logs if path.is_file() and path.read_bytes() == logs[path]]
    assert len(others) >= 1
    assert sum(path.is_file() for path in logs) >= len(logs) - 1  # its own last file may be cut off where it goes on


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises((NotFoundError, UsageError), match="no such folder"):
        run("--resume", str(tmp_path / "nothing"), "--quiet")
