"""The stream: every sample once, the same samples whatever the number of ranks or workers."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nostalgia.data.images import stratified_split, to_rgb
from nostalgia.data.sources import load_source
from nostalgia.data.stream import Prepared, TaskLoader, View, curvature_batches, stratified_choice
from nostalgia.data.tasks import build_tasks, expand_specs
from nostalgia.data.transforms import uniform
from nostalgia.errors import NotFoundError, UsageError

VIEW = View(8, (0.5,) * 3, (0.5,) * 3, torch.device("cpu"))


def loader(images: Prepared, batch: int, rank: int = 0, world: int = 1, **options) -> TaskLoader:
    settings = {"train": True, "augment": "shift", **options}
    return TaskLoader(images, VIEW, name="t", per_device_batch_size=batch, rank=rank, world_size=world, **settings)


@pytest.fixture(scope="module")
def digits() -> Prepared:
    return Prepared([load_source("digits").val], [()], 8)


def tree(root: Path, splits: tuple[str, ...] = ("train", "val"), classes: int = 3, images: int = 4) -> Path:
    """A small ImageFolder tree of real digits."""
    source = load_source("digits").train
    for split in splits:
        for label in range(classes):
            folder = root / split / f"digit{label}"
            folder.mkdir(parents=True)
            members = (source.labels == label).nonzero().flatten()[:images]
            for i in members.tolist():
                Image.fromarray(source.image(i).permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("train", [True, False])
def test_every_sample_counts_once(digits: Prepared, world: int, train: bool) -> None:
    loaders = [loader(digits, 16, rank, world, train=train, accumulation_steps=2) for rank in range(world)]
    seen, counted = [], 0
    for steps in zip(*(one.epoch(1) for one in loaders), strict=True):
        assert len({len(step.micro_batches) for step in steps}) == 1
        counted += steps[0].num_samples
        for step in steps:
            seen += [batch.indices[batch.valid] for batch in step.micro_batches]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(len(digits)))
    assert counted == len(digits)


def test_two_ranks_see_what_one_sees(digits: Prepared) -> None:
    halves = [loader(digits, 8, rank, 2) for rank in range(2)]
    for whole, *parts in zip(loader(digits, 16).epoch(3), *(h.epoch(3) for h in halves), strict=True):
        batches = [part.micro_batches[0] for part in parts]
        for field in ("images", "labels", "indices"):
            union = torch.cat([getattr(b, field)[b.valid] for b in batches])
            assert torch.equal(union, getattr(whole.micro_batches[0], field))


def test_starting_at_a_step_is_going_on(digits: Prepared) -> None:
    every = list(loader(digits, 16).epoch(2))
    rest = list(loader(digits, 16).epoch(2, start_step=5))
    assert [s.step for s in rest] == [s.step for s in every[5:]]
    for a, b in zip(rest, every[5:], strict=True):
        assert torch.equal(a.micro_batches[0].images, b.micro_batches[0].images)


def test_epochs_differ_and_augmentation_moves(digits: Prepared) -> None:
    first, second = (next(loader(digits, 16).epoch(e)).micro_batches[0] for e in (1, 2))
    assert not torch.equal(first.indices, second.indices)
    plain = next(loader(digits, 16, augment="none").epoch(1)).micro_batches[0]
    assert torch.equal(plain.indices, first.indices)
    assert not torch.equal(plain.images, first.images)


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    source = load_source(str(tree(tmp_path / "animals")))
    images = Prepared([source.train], [()], 8)
    alone, helped = (list(loader(images, 4, num_workers=n, augment="crop_flip").epoch(1)) for n in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.micro_batches[0].images, b.micro_batches[0].images)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    root = tree(tmp_path / "animals")
    broken = next((root / "train" / "digit1").iterdir())
    broken.write_bytes(b"not an image")
    images = Prepared([load_source(str(root)).train], [()], 8)
    for workers in (0, 1):
        with pytest.raises(NotFoundError, match=broken.name):
            list(loader(images, 4, num_workers=workers).epoch(1))


def test_curvature_set_does_not_depend_on_ranks(digits: Prepared) -> None:
    def chosen(world: int) -> list[int]:
        shares = [
            curvature_batches(digits, VIEW, name="t", num_samples=50, batch_size=8, seed=0, rank=r, world_size=world)
            for r in range(world)
        ]
        return [i for share in shares for batch in share for i in batch.indices.tolist()]

    assert chosen(1) == chosen(2) == chosen(3)
    assert len(set(chosen(1))) == 50


def test_curvature_set_keeps_class_proportions() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 50)
    counts = torch.bincount(labels[stratified_choice(labels, 40, seed=1)])
    assert counts.tolist() == [20, 10, 10]


def test_augmentation_numbers_are_uniform_and_distinct() -> None:
    draws = uniform(3, 1, torch.arange(20000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(0), torch.full((4,), 0.5, dtype=torch.float64), atol=0.01, rtol=0)
    assert abs(float(torch.corrcoef(draws.T)[0, 1])) < 0.03
    assert torch.equal(uniform(3, 1, torch.tensor([7]), 4)[0], draws[7])


def test_folder_layouts(tmp_path: Path) -> None:
    both = load_source(str(tree(tmp_path / "a")))
    assert (both.kind, len(both.train), len(both.val)) == ("folder", 12, 12)
    held_out = load_source(str(tree(tmp_path / "b", splits=(".",), images=5)))
    assert (len(held_out.train), len(held_out.val)) == (12, 3)
    by_name = load_source("cats", root=tree(tmp_path / "root" / "cats").parent, entries={"cats": {}})
    assert by_name.name == "cats"


def test_idx_files(tmp_path: Path) -> None:
    source = load_source("digits").train
    pixels = torch.stack([source.image(i)[0] for i in range(20)]).numpy()
    labels = source.labels[:20].numpy().astype(np.uint8)
    for prefix in ("train", "t10k"):
        head = bytes([0, 0, 8, 3]) + np.array([20, 8, 8], ">u4").tobytes()
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
        head = bytes([0, 0, 8, 1]) + np.array([20], ">u4").tobytes()
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    found = load_source("mnist", root=tmp_path)
    assert torch.equal(found.train.image(3), source.image(3))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01")
    with pytest.raises(NotFoundError, match="t10k-labels"):
        load_source("mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [("digts", UsageError, "did you mean digits"), ("caltech256", NotFoundError, "caltech256"),
     ("../up", NotFoundError, "no such folder")],
)  # fmt: skip
def test_names_that_lead_nowhere(tmp_path: Path, name: str, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        load_source(name, root=tmp_path)


def test_faults_in_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="empty"):
        load_source(str(tmp_path / "empty"))
    missing = tree(tmp_path / "missing")
    for image in (missing / "val" / "digit2").iterdir():
        image.unlink()
    (missing / "val" / "digit2").rmdir()
    with pytest.raises(NotFoundError, match=r"digit2.*missing from validation"):
        load_source(str(missing))
    cased = tree(tmp_path / "cased")
    (cased / "train" / "DIGIT1").mkdir()
    with pytest.raises(NotFoundError, match="differ only in case"):
        load_source(str(cased))
    looped = tree(tmp_path / "looped")
    (looped / "train" / "digit0" / "again").symlink_to(looped / "train" / "digit0")
    assert len(load_source(str(looped)).train) == 12


def test_task_lists() -> None:
    specs = expand_specs(
        [{"dataset": "digits", "classes": [5, 3]}, {"dataset": "digits", "transform": "invert"}, "digits"], "digits"
    )
    tasks = build_tasks(specs, load_source, seed=0)
    assert [t.name for t in tasks] == ["task1_digits", "task2_digits", "task3_digits"]
    assert tasks[0].classes == ("5", "3")
    assert set(tasks[0].train.labels.tolist()) == {0, 1}
    parts = build_tasks(expand_specs(None, "digits", 3, "classes"), load_source, seed=1)
    assert sorted(c for t in parts for c in t.classes) == [str(c) for c in range(10)]
    for bad in ([], [3], [{"classes": [1]}], [{"dataset": "digits", "transform": "invrt"}]):
        with pytest.raises(UsageError):
            expand_specs(bad, "digits")
    with pytest.raises(UsageError, match="0 to 9"):
        build_tasks(expand_specs([{"dataset": "digits", "classes": [10]}], "digits"), load_source, seed=0)


def test_split_is_stratified_and_fixed() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2)
    train, val = stratified_split(labels, 0.2)
    assert torch.bincount(labels[val]).tolist() == [2, 1, 1]
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(17))
    assert torch.equal(stratified_split(labels, 0.2)[1], val)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "F"])
def test_any_image_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    assert to_rgb(image).mode == "RGB"
