"""Where a data set is looked for, in which order, and the one error when it is nowhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from nostalgia.data import torchvision_files
from nostalgia.data.catalog import CATALOG, ENTRY_KEYS
from nostalgia.data.imagenet import SUBSETS
from nostalgia.data.sources import load_source
from nostalgia.data.torchvision_files import SETS
from nostalgia.errors import NotFoundError, UsageError
from tests.unit.data.trees import write_tree

CLASSES = ("apple", "bee", "cat")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_the_catalog_knows_all_names_and_only_real_references() -> None:
    names = "cifar10 cifar100 mnist fashion_mnist tinyimagenet caltech256 cub200 flowers102 imagenet100 imagenet-r "
    names += "imagenet-a imagenet1k svhn dtd food101 eurosat digits domainnet-clipart domainnet-sketch"
    assert set(names.split()) <= set(CATALOG)
    import torchvision.datasets

    for entry in CATALOG.values():
        assert entry.torchvision is None or entry.torchvision in SETS
        assert entry.wnids is None or len(SUBSETS[entry.wnids]) == entry.classes
        assert entry.embedded or entry.hub or entry.torchvision
        for hub in entry.hub:
            assert hub.id.count("/") == 1, "short names without an owner have gone from the hub"
    for name in SETS:
        assert hasattr(torchvision.datasets, name)


def test_a_folder_under_the_root_then_the_root_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "imagenet1k", replace(CATALOG["imagenet1k"], classes=3))
    write_tree(tmp_path, CLASSES)
    assert load_source("imagenet1k", root=tmp_path).where == str(tmp_path)
    write_tree(tmp_path / "imagenet", CLASSES)
    assert load_source("imagenet1k", root=tmp_path).where == str(tmp_path / "imagenet")
    write_tree(tmp_path / "imagenet1k", CLASSES)
    assert load_source("imagenet1k", root=tmp_path).where == str(tmp_path / "imagenet1k")


def test_another_data_set_in_the_root_is_not_taken_for_it(tmp_path: Path) -> None:
    write_tree(tmp_path, CLASSES)
    with pytest.raises(NotFoundError, match="train: 3 classes, not 100"):
        load_source("imagenet100", root=tmp_path)


def test_the_error_lists_what_was_tried_and_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "cub200").mkdir()
    with pytest.raises(NotFoundError) as caught:
        load_source("cub200", root=tmp_path, download=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == "dataset cub200 was not found; tried"
    assert lines[1] == f"  folder {tmp_path / 'cub200'}: empty"
    assert lines[2].startswith("  hub Donghyun99/CUB-200-2011: not in the cache")
    assert "HF_HUB_OFFLINE" in lines[2]
    assert lines[3].startswith("  hub bentrevett/caltech-ucsd-birds-200-2011: not in the cache")
    assert lines[-1].startswith("to get it: unpack CUB_200_2011.tgz")
    assert str(tmp_path) in lines[-1]
    assert len(lines) <= 12


@pytest.mark.parametrize("name", sorted(set(CATALOG) - {"digits"}))
def test_every_name_is_refused_in_a_few_lines_where_it_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision_files, "SYSTEM", {})
    with pytest.raises(NotFoundError, match=f"dataset {name} was not found") as caught:
        load_source(name, root=tmp_path, download=False)
    assert len(str(caught.value).splitlines()) <= 12
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "nearest"), [("digts", "digits"), ("CIFAR100", "cifar100"), ("fashion-mnist", "fashion_mnist")]
)
def test_an_unknown_name_gets_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"did you mean {nearest}\?") as caught:
        load_source(name)
    assert "\n" not in str(caught.value)


def test_entries_of_ones_own(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "elsewhere", CLASSES)
    source = load_source("fruit", entries={"fruit": {"path": str(folder), "augment": "flip", "classes": 3}})
    assert (source.name, source.augment, len(source.train.classes)) == ("fruit", "flip", 3)
    (tmp_path / "elsewhere").rename(tmp_path / "cars")
    assert load_source("cars", root=tmp_path, entries={"cars": {}}).name == "cars"
    with pytest.raises(NotFoundError, match="no such folder"):
        load_source("fruit", entries={"fruit": {"path": str(folder)}})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"pth": "x"}, "did you mean path"),
        ({"classes": 0}, "positive number"),
        ({"classes": "3"}, "positive number"),
        ({"path": 3}, "allowed is a text"),
        ({"augment": "mixup"}, "allowed are none"),
        ({"label_column": "x"}, "need path or hub_id"),
        ("x", "expected keys"),
    ],
)
def test_malformed_entries(entry: object, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_source("mine", entries={"mine": entry})
    assert "dataset.entries.mine" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(ENTRY_KEYS) >= {"path", "hub_id", "classes"}
