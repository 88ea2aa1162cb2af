"""The stream: every sample once, the same samples whatever the number of ranks or workers."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nostalgia.data.exemplars import ExemplarLoader
from nostalgia.data.images import ArrayImages, Subset
from nostalgia.data.resizing import Resizing
from nostalgia.data.sources import load_source
from nostalgia.data.stream import Prepared, TaskLoader, View, curvature_batches, stratified_choice
from nostalgia.errors import NotFoundError, RunFailedError, UsageError
from tests.unit.data.trees import write_tree

VIEW = View(Resizing(8), (0.5,) * 3, (0.5,) * 3, torch.device("cpu"))


def loader(images: Prepared, batch: int, rank: int = 0, world: int = 1, **options) -> TaskLoader:
    settings = {"train": True, "augment": "shift", **options}
    return TaskLoader(images, VIEW, name="t", per_device_batch_size=batch, rank=rank, world_size=world, **settings)


@pytest.fixture(scope="module")
def digits() -> Prepared:
    return Prepared([load_source("digits").val], [()], Resizing(8))


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


@pytest.mark.parametrize("world", [1, 2, 3])
def test_no_batch_of_training_is_of_one_row(digits: Prepared, world: int) -> None:
    """Whatever is left for the last micro-batch; what fills it up is another sample, and counts nowhere."""
    for left in (1, 2, 4):
        images = Prepared([Subset(load_source("digits").val, torch.arange(12 + left))], [()], Resizing(8))
        for rank in range(world):
            *_, last = loader(images, 12 // world, rank, world).epoch(1)
            (batch,) = last.micro_batches
            assert len(batch) >= 2
            assert len(batch.indices.unique()) == len(batch)
    (alone,) = next(loader(digits, 1).epoch(1)).micro_batches
    assert len(alone) == 1


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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = write_tree(tmp_path_factory.mktemp("animals"), ["ant", "bee", "cat"], train=9)
    return Prepared([load_source(str(folder)).train], [("invert",)], Resizing(8))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_worker_processes_change_nothing(files: Prepared, workers: int) -> None:
    """Neither batches nor the process's random state, which dropout draws from."""
    alone, helped = (loader(files, 4, num_workers=n, augment="crop_flip") for n in (0, workers))
    before = torch.get_rng_state()
    for epoch in (1, 2):
        for a, b in zip(alone.epoch(epoch), helped.epoch(epoch), strict=True):
            for field in ("images", "labels", "valid", "indices", "tasks"):
                assert torch.equal(getattr(a.micro_batches[0], field), getattr(b.micro_batches[0], field))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_take_up_a_new_epoch_after_one_that_was_left(files: Prepared) -> None:
    plain, worked = (loader(files, 4, num_workers=n) for n in (0, 1))
    next(iter(worked.epoch(1)))
    expected = torch.cat([s.micro_batches[0].images for s in plain.epoch(2, start_step=3)])
    assert torch.equal(torch.cat([s.micro_batches[0].images for s in worked.epoch(2, start_step=3)]), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(tmp_path: Path, workers: int) -> None:
    root = write_tree(tmp_path / "animals", ["ant", "bee", "cat"])
    broken = next((root / "train" / "bee").iterdir())
    broken.write_bytes(b"not an image")
    images = Prepared([load_source(str(root)).train], [()], Resizing(8))
    with pytest.raises(NotFoundError, match=broken.name) as caught:
        list(loader(images, 4, num_workers=workers).epoch(1))
    assert "\n" not in str(caught.value)


def test_a_worker_that_dies_ends_the_run_with_one_line(files: Prepared) -> None:
    class Deadly:
        name, classes, labels, in_memory = "deadly", ("a",), torch.zeros(4, dtype=torch.int64), False

        def __len__(self) -> int:
            return 4

        def image(self, index: int, at_least: int | None = None) -> torch.Tensor:
            os._exit(1)

        def describe(self, index: int) -> str:
            return "deadly"

    with pytest.raises(RunFailedError, match=r"a loader process died .* dataset\.num_workers"):
        list(loader(Prepared([Deadly()], [()], Resizing(8)), 2, num_workers=1).epoch(1))


def test_skipped_steps_are_not_decoded(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "animals", ["ant", "bee", "cat"])
    images = Prepared([load_source(str(root)).train], [()], Resizing(8))
    one = loader(images, 3)
    first = next(iter(one.epoch(1))).micro_batches[0].indices.tolist()
    for index in first:
        Path(images.datasets[0].describe(index)).write_bytes(b"broken since")
    assert len(list(loader(images, 3).epoch(1, start_step=1))) == 5
    with pytest.raises(NotFoundError):
        list(loader(images, 3).epoch(1))


def test_evaluation_is_in_order_and_as_it_is(digits: Prepared) -> None:
    whole = torch.cat([s.micro_batches[0].indices for s in loader(digits, 16, train=False).epoch(0)])
    assert torch.equal(whole, torch.arange(len(digits)))
    batch = next(loader(digits, 16, train=False, augment="crop_flip").epoch(5)).micro_batches[0]
    expected = torch.stack([digits.image(i) for i in range(16)]) / 255
    torch.testing.assert_close(batch.images, (expected - 0.5) / 0.5)


def test_a_part_of_an_evaluation_holds_every_class_in_proportion(tmp_path: Path) -> None:
    """Class folders come class by class: their first images would be of one class."""
    root = write_tree(tmp_path / "animals", ["ant", "bee", "cat"])
    images = Prepared([load_source(str(root)).train], [()], Resizing(8))
    one = loader(images, 6, train=False, stratified=True)
    first, again = (next(iter(one.epoch(epoch))).micro_batches[0] for epoch in (0, 1))
    assert first.labels.bincount().tolist() == [2, 2, 2]
    assert torch.equal(first.indices, again.indices)
    whole = torch.cat([step.micro_batches[0].indices for step in one.epoch(0)])
    assert torch.equal(whole.sort().values, torch.arange(len(images)))


def test_memory_and_files_give_the_same_pixels() -> None:
    for size in (8, 5, 32):
        images = Prepared([load_source("digits").val], [()], Resizing(size))
        together = images.gather(torch.arange(20), torch.device("cpu"))
        assert torch.equal(together, torch.stack([images.image(i) for i in range(20)]))


def test_joint_data_sets_keep_their_labels_sizes_and_policies(files: Prepared) -> None:
    source = load_source("digits")
    fashion = ArrayImages("x", np.full((5, 11, 7, 3), 9, dtype=np.uint8), [1, 0, 1, 0, 1], ["a", "b"])
    images = Prepared([source.val, fashion], [(), ("invert",)], Resizing(8))
    batches = [s.micro_batches[0] for s in loader(images, 50, augment=["none", "shift"]).epoch(1)]
    tasks, indices = (torch.cat([getattr(b, f) for b in batches]) for f in ("tasks", "indices"))
    labels, pixels = (torch.cat([getattr(b, f) for b in batches]) for f in ("labels", "images"))
    assert tasks.bincount().tolist() == [len(source.val), 5]
    assert torch.equal(tasks, (indices >= len(source.val)).long())
    order = indices[tasks == 1] - len(source.val)
    assert torch.equal(labels[tasks == 1], fashion.labels[order])
    torch.testing.assert_close(pixels[tasks == 1], torch.full((5, 3, 8, 8), (246 / 255 - 0.5) / 0.5))
    first = int(indices[tasks == 0][0])
    expected = (source.val.image(first) / 255 - 0.5) / 0.5  # policy "none": exactly the image
    torch.testing.assert_close(pixels[tasks == 0][0], expected)
    mixed = Prepared([source.val, files.datasets[0]], [(), ()], Resizing(8))  # one in memory, one from files
    assert sum(len(s.micro_batches[0]) for s in loader(mixed, 50).epoch(1)) == len(mixed)


def test_no_samples() -> None:
    nothing = ArrayImages("x", np.zeros((0, 2, 2), dtype=np.uint8), [], ["a"])
    with pytest.raises(UsageError, match="no samples to train on"):
        loader(Prepared([nothing], [()], Resizing(8)), 4)


def test_a_loader_that_is_dropped_leaves_no_process(files: Prepared) -> None:
    before = {child.pid for child in multiprocessing.active_children()}
    one = loader(files, 4, num_workers=2)
    list(one.epoch(1))
    assert len({child.pid for child in multiprocessing.active_children()} - before) == 2
    del one
    assert {child.pid for child in multiprocessing.active_children()} <= before


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


def test_a_beginning_of_a_choice_keeps_them_too() -> None:
    """What is left of a task's exemplars when later ones need room, where all of its images fitted first."""
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 20)
    for count in (60, 80, 200):
        beginning = stratified_choice(labels, count, seed=1)[:20]
        assert torch.bincount(labels[beginning]).tolist() == [10, 5, 5]


def test_drawn_exemplars_are_shared_out_and_never_one_alone(files: Prepared) -> None:
    def drawn(rank: int, world_size: int) -> tuple[list[int], list[float]]:
        exemplars = [(1, index) for index in range(5)]
        loader = ExemplarLoader(
            exemplars, files, VIEW, augment=["none"], heads=[0], seed=0, rank=rank, world_size=world_size
        )
        batch = loader.drawn(4, 7)
        return batch.indices.tolist(), batch.weights.tolist()

    whole, _ = drawn(0, 1)
    shares = [drawn(rank, 3) for rank in range(3)]
    assert [weights for _, weights in shares] == [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    assert [i for indices, weights in shares for i, w in zip(indices, weights, strict=True) if w] == whole


@pytest.mark.parametrize("threads", [1, 3])
def test_curvature_set_from_files_is_plain_and_may_be_empty(files: Prepared, threads: int) -> None:
    options = {"name": "t", "num_samples": 6, "batch_size": 4, "seed": 0, "world_size": 7, "num_workers": threads}
    shares = [curvature_batches(files, VIEW, rank=rank, **options) for rank in range(7)]
    assert [sum(len(b) for b in share) for share in shares] == [1, 1, 1, 1, 1, 1, 0]
    for share in shares[:6]:
        expected = 1 - files.image(int(share[0].indices[0])) / 255  # the task's shift inverts
        torch.testing.assert_close(share[0].images[0], (expected - 0.5) / 0.5)
        assert share[0].valid.all()
