"""What `python -m nostalgia.evaluate` takes and refuses, and which images a folder gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from nostalgia.config import parse as parse_training
from nostalgia.config import save
from nostalgia.data.images import ArrayImages
from nostalgia.data.resizing import Resizing
from nostalgia.data.stream import Prepared, TaskLoader, View
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.evaluate import parse
from nostalgia.evaluation.accuracy import evaluate
from nostalgia.evaluation.per_class import evaluate_classes
from nostalgia.experiment.remeasure import _chosen
from nostalgia.experiment.task_data import folder_task
from nostalgia.models import make_head
from nostalgia.models.task_model import TaskModel
from tests.unit.data.trees import write_tree


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder as far as the command line looks at it."""
    words = ["experiment.tasks=[digits,{dataset: digits, transform: invert}]", "model=vit_tiny", "train.devices=2"]
    save(parse_training(words).config, tmp_path / "config.yaml")
    return tmp_path


def test_the_runs_configuration_with_what_may_differ(run: Path) -> None:
    request = parse([str(run), "dataset.batch_size=7", "--task", "2", "dataset.entries.mine.path=/x"])
    assert (request.config.dataset.batch_size, request.config.train.devices) == (7, "auto")
    assert (request.task, request.data, request.run_dir) == ("2", None, run.resolve())
    assert _chosen(request, ["task1_digits", "task2_digits"]) == ["task2_digits"]


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["train.lr=1"], UsageError, "takes KEY=VALUE of dataset.root"),
        (["model=vit"], UsageError, "takes KEY=VALUE"),
        (["--tusk", "1"], UsageError, "--tusk"),
        (["dataset.batch_size=0"], UsageError, "1 or more"),
        (["--data", "/nowhere/at/all"], NotFoundError, "no such folder"),
    ],
)
def test_refusals(run: Path, words: list[str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        parse([str(run), *words])
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no config.yaml there"):
        parse([str(tmp_path)])


def test_which_task(run: Path) -> None:
    names = ["task1_digits", "task2_digits"]
    with pytest.raises(UsageError, match="the run has task1_digits, task2_digits"):
        _chosen(parse([str(run), "--task", "3"]), names)
    with pytest.raises(UsageError, match="needs --task NAME"):
        _chosen(parse([str(run), "--data", str(run)]), names)


def test_a_folder_of_images_under_the_tasks_classes(run: Path, tmp_path: Path) -> None:
    config, classes = parse([str(run)]).config, [str(c) for c in range(10)]
    both = {"task1_digits": classes, "task2_digits": classes}
    write_tree(tmp_path / "mine", ("7", "3"), train=4, val=2)
    task = folder_task(config, tmp_path / "mine", "task2_digits", both)
    assert (len(task.val), task.val.labels.tolist(), task.transform) == (4, [3, 3, 7, 7], ("invert",))
    whole = folder_task(config, tmp_path / "mine" / "train", "task1_digits", both)
    assert (len(whole.val), whole.transform) == (8, ())
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").touch()
    with pytest.raises(UsageError, match="allowed is a folder of class folders"):
        folder_task(config, tmp_path / "saved", "task1_digits", both)
    write_tree(tmp_path / "mine", ("many",), train=1, val=1)
    with pytest.raises(NotFoundError, match="class folders many are no classes of task1_digits; it knows 0, 1"):
        folder_task(config, tmp_path / "mine", "task1_digits", both)


def test_classes_add_up_to_the_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 4, 4), generator=generator, dtype=torch.uint8).numpy()
    labels = torch.randint(0, 3, (50,), generator=generator)  # a fourth class has no image
    images = Prepared([ArrayImages("noise", pixels, labels.tolist(), "abcd")], [()], Resizing(4))
    view = View(Resizing(4), (0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    loader = TaskLoader(images, view, name="t", per_device_batch_size=8, train=False)
    accelerator, head = Accelerator(cpu=True), make_head(48, 4, seed=0)
    network = torch.nn.Flatten()
    whole = evaluate(TaskModel(network, [head]), loader, accelerator)
    scores = evaluate_classes(network, head, "abcd", loader, accelerator)
    assert (scores.accuracy, scores.num_samples, sum(scores.correct)) == (whole.accuracy, 50, whole.correct)
    assert scores.loss == pytest.approx(whole.loss, rel=1e-12)
    assert scores.counts == labels.bincount(minlength=4).tolist()
    predicted = head(view.normalise_(view.scale(images.gather(torch.arange(50), view.device))).flatten(1)).argmax(1)
    for index in range(3):
        mine = labels == index
        assert scores.of_class(index) == float((predicted[mine] == index).double().mean())
    assert scores.of_class(3) is None
    limited = evaluate_classes(network, head, "abcd", loader, accelerator, max_batches=2)
    assert limited.num_samples == 16
