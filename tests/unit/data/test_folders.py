"""Class folders: what is found, in which order, and one line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from nostalgia.data.sources import load_source
from nostalgia.data.tasks import build_tasks, data_notes, expand_specs
from nostalgia.errors import NostalgiaError, NotFoundError, UsageError
from tests.unit.data.trees import write_class, write_tree

CLASSES = ("apple", "bee", "cat")


def refusal(folder: Path | str, kind: type[NostalgiaError]) -> str:
    with pytest.raises(kind) as caught:
        load_source(str(folder), download=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_splits_by_their_usual_names(tmp_path: Path, val: str) -> None:
    source = load_source(str(write_tree(tmp_path / "mine", CLASSES, names=("train", val))))
    assert (source.kind, source.name, source.train.classes) == ("folder", "mine", CLASSES)
    assert (len(source.train), len(source.val)) == (18, 9)
    assert source.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert source.train.describe(7).endswith("train/bee/1_001.png")


def test_validation_is_preferred_to_test(tmp_path: Path) -> None:
    write_tree(tmp_path / "mine", CLASSES, train=4, val=2)
    write_tree(tmp_path / "mine" / "test", CLASSES, train=1, val=0)
    assert len(load_source(str(tmp_path / "mine")).val) == 6


def test_one_split_is_divided_by_class_and_always_the_same_way(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES, train=10, val=0)
    first, second = (load_source(str(folder), val_fraction=0.3) for _ in range(2))
    assert first.val.labels.bincount().tolist() == [3, 3, 3]
    assert first.train.labels.bincount().tolist() == [7, 7, 7]
    held_out = [first.val.describe(i) for i in range(9)]
    assert held_out == [second.val.describe(i) for i in range(9)]
    assert set(held_out).isdisjoint(first.train.describe(i) for i in range(21))
    assert "9 of 30 images held out" in first.notes[0]


def test_hidden_files_other_files_and_subfolders(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES)
    (folder / "train" / "apple" / ".hidden.png").write_bytes(b"x")
    (folder / "train" / "apple" / "notes.txt").write_text("x")
    (folder / "train" / ".git").mkdir()
    for around in (folder, folder / "train"):
        (around / "__MACOSX" / "apple").mkdir(parents=True)
        (around / "__MACOSX" / "apple" / "._0.png").write_bytes(b"x")
    write_class(folder / "train" / "apple" / "more", 0, 2, suffix=".JPG")
    assert load_source(str(folder)).train.labels.bincount().tolist() == [8, 6, 6]


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "vehicles", ["car", "plane", "train"], val=0)
    assert load_source(str(folder)).train.classes == ("car", "plane", "train")


def test_hostile_class_names_are_data(tmp_path: Path) -> None:
    names = ["$(rm -rf x)", "%2e%2e%2f", "[red]bold[red]", "a; drop table", "名前"]
    folder = write_tree(tmp_path / "mine", names)
    assert load_source(str(folder)).train.classes == tuple(sorted(names))


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    write_class(tmp_path / "elsewhere", 2, 6)
    folder = write_tree(tmp_path / "mine", CLASSES[:2], val=0)
    (folder / "cat").symlink_to(tmp_path / "elsewhere")
    assert load_source(str(folder)).train.classes == CLASSES


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_that_leads_back_up_is_refused(tmp_path: Path, target: str) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES, val=0)
    (folder / "bee" / "again").symlink_to(target)
    message = refusal(folder, NotFoundError)
    assert "bee/again" in message
    assert "a symbolic link back to" in message


def test_a_link_to_an_image_that_is_gone_is_refused(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES)
    (folder / "train" / "apple" / "gone.png").symlink_to("/nowhere/gone.png")
    with pytest.raises(NotFoundError, match=r"gone.png: a symbolic link to /nowhere/gone.png, which is not there"):
        load_source(str(folder))


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES, val=0)
    (folder / "bee" / "self").symlink_to("self")
    assert "bee/self" in refusal(folder, NotFoundError)


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    assert "void: empty" in refusal(tmp_path / "void", NotFoundError)


def test_split_without_images(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES)
    (folder / "val").rename(tmp_path / "away")
    (folder / "test").mkdir()
    assert "mine/test: empty" in refusal(folder, NotFoundError)


def test_validation_without_training(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES)
    (folder / "train").rename(tmp_path / "away")
    assert "no train/ beside it" in refusal(folder, NotFoundError)


def test_images_without_class_folders(tmp_path: Path) -> None:
    write_class(tmp_path / "flat", 0, 3)
    assert "3 images but no class folders" in refusal(tmp_path / "flat", NotFoundError)


def test_class_without_images(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES)
    (folder / "train" / "dog").mkdir()
    assert "train/dog: class folder without an image" in refusal(folder, NotFoundError)


def test_class_missing_from_validation(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES)
    write_class(folder / "train" / "dog", 3, 2)
    assert "'dog' is missing from validation" in refusal(folder, NotFoundError)


def test_class_unknown_to_training(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES)
    write_class(folder / "val" / "dog", 3, 2)
    assert "'dog' of the validation split does not occur in training" in refusal(folder, NotFoundError)


def test_classes_that_differ_only_in_case(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", ["Cat", "cat"])
    assert "'Cat' and 'cat' differ only in case" in refusal(folder, NotFoundError)


def test_one_image_cannot_be_divided_but_can_be_trained_on(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "mine", CLASSES, train=1, val=1)
    assert len(load_source(str(folder)).train) == 3
    assert "'apple' has 1 image" in refusal(folder / "train", NotFoundError)


def test_wrong_number_of_classes_for_the_name(tmp_path: Path) -> None:
    write_tree(tmp_path / "cifar10", CLASSES)
    with pytest.raises(NotFoundError, match="3 classes where cifar10 has 10"):
        load_source("cifar10", root=tmp_path, download=False)


@pytest.mark.parametrize("name", ["../nowhere", "a/b", "..\\x", "no..where"])
def test_a_name_that_is_a_path_to_nowhere(name: str) -> None:
    assert "no such folder" in refusal(name, UsageError)


def test_a_file_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "a file, not a folder" in refusal(tmp_path / "file", UsageError)


def test_what_is_left_out_of_a_folder_is_counted_and_named(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "mine", ["a", "b"])
    assert load_source(str(root)).notes == ()
    write_class(root / "test" / "a", 0, 2)
    (root / "train" / "a" / "list.txt").write_text("")
    (root / "train" / "b" / "deep").mkdir()
    (root / "train" / "b" / "deep" / "more.TXT").write_text("")
    (root / "train" / ".DS_Store").write_text("")
    (root / "train" / "loose.png").write_text("")
    (root / "val" / "b" / "noending").write_text("")
    train, other, val = load_source(str(root)).notes
    assert train == (
        f"left out of {root}/train: 4 files that are no images of a class (1 .png, 2 .txt, 1 hidden; the first is .DS_Store)"
    )
    assert other == f"left out of {root}: the split folder test"
    assert val == (
        f"left out of {root}/val: 1 files that are no images of a class (1 without an ending; the first is b/noending)"
    )
    tasks = build_tasks(expand_specs([str(root), str(root)], ""), load_source, 0)
    assert data_notes(tasks) == [f"mine: {note}" for note in (train, other, val)]
