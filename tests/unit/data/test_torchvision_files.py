"""torchvision's data sets, read by torchvision's own classes from the files they leave."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision.datasets as tvd

from nostalgia.data.catalog import CATALOG
from nostalgia.data.sources import load_source
from nostalgia.errors import NotFoundError
from tests.unit.data.trees import digit, write_class


@pytest.fixture(autouse=True)
def any_class_count_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in CATALOG.items():
        monkeypatch.setitem(CATALOG, name, replace(entry, classes=None, hub=()))


def pixels(count: int) -> np.ndarray:
    return np.stack([np.asarray(digit(i % 10, i // 10, size=32)) for i in range(count)])  # (N, 32, 32, 3)


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's pickled batches; the checksums torchvision compares with are those of these files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, value: dict) -> list[str]:
        data = pickle.dumps(value)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name: str, count: int) -> list[str]:
        rows = pixels(count).transpose(0, 3, 1, 2).reshape(count, -1)
        return write(name, {"data": rows, "labels": [i % 10 for i in range(count)]})

    monkeypatch.setattr(tvd.CIFAR10, "train_list", [batch("data_batch_1", 20), batch("data_batch_2", 20)])
    monkeypatch.setattr(tvd.CIFAR10, "test_list", [batch("test_batch", 10)])
    file, md5 = write("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(tvd.CIFAR10, "meta", {"filename": file, "key": "label_names", "md5": md5})
    return folder


@pytest.mark.parametrize("place", [".", "cifar10"])
def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    write_cifar10(tmp_path / place, monkeypatch)
    source = load_source("cifar10", root=tmp_path, download=False)
    assert (source.kind, len(source.train), len(source.val)) == ("torchvision", 40, 10)
    assert source.train.classes[3] == "class3"
    assert np.array_equal(source.train.image(13).permute(1, 2, 0).numpy(), pixels(14)[13])


def test_a_folder_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    for label in range(2):
        write_class(tmp_path / "cifar10" / str(label), label, 5)
    assert load_source("cifar10", root=tmp_path, download=False).kind == "folder"


def test_broken_is_told_from_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_cifar10(tmp_path, monkeypatch)
    (folder / "data_batch_2").write_bytes(b"half")
    with pytest.raises(NotFoundError, match=r"cifar-10-batches-py is there but broken or partial .* delete it"):
        load_source("cifar10", root=tmp_path, download=False)
    with pytest.raises(NotFoundError, match=r"torchvision CIFAR10 in .*: not there"):
        load_source("cifar10", root=tmp_path / "none", download=False)
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "cifar-10-python.tar.gz").write_bytes(b"half")
    with pytest.raises(NotFoundError, match=r"cifar-10-python.tar.gz is there but broken or partial"):
        load_source("cifar10", root=tmp_path / "archive", download=False)


def test_a_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvd.CIFAR10, "url", "http://127.0.0.1:9/none.tar.gz")
    with pytest.raises(NotFoundError, match=r"torchvision CIFAR10 in .*: download failed") as caught:
        load_source("cifar10", root=tmp_path, download=True)
    assert len(str(caught.value).splitlines()) <= 12


def test_a_download_that_fails_leaves_nothing_that_looks_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tvd.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    for _ in range(2):
        with pytest.raises(NotFoundError, match=r"torchvision MNIST in .*: download failed"):
            load_source("mnist", root=tmp_path / "data", download=True)
    assert not (tmp_path / "data" / "MNIST").exists()


def test_nothing_is_left_behind_by_looking(tmp_path: Path) -> None:
    for name in ("caltech256", "dtd", "eurosat", "flowers102", "food101", "svhn"):
        with pytest.raises(NotFoundError, match="not there"):
            load_source(name, root=tmp_path, download=False)
    assert list(tmp_path.iterdir()) == []


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {}
    for split, count in (("train", 20), ("test", 10)):
        path = tmp_path / f"{split}_32x32.mat"
        labels = np.array([i % 10 or 10 for i in range(count)])[:, None]  # the file says 10 for a zero
        scipy.io.savemat(path, {"X": pixels(count).transpose(1, 2, 3, 0), "y": labels})
        lists[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(tvd.SVHN, "split_list", lists)
    source = load_source("svhn", root=tmp_path, download=False)
    assert (source.kind, len(source.train), len(source.val)) == ("torchvision", 20, 10)
    assert source.train.labels[:3].tolist() == [0, 1, 2]
    assert np.array_equal(source.train.image(13).permute(1, 2, 0).numpy(), pixels(14)[13])


def test_flowers102(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for i in range(12):
        digit(i % 3, i).save(base / "jpg" / f"image_{i + 1:05d}.jpg")
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([[i % 3 + 1 for i in range(12)]])})
    numbers = {"trnid": [[1, 2, 3]], "valid": [[4, 5, 6]], "tstid": [[7, 8, 9, 10, 11, 12]]}
    scipy.io.savemat(base / "setid.mat", numbers)
    checked = {
        key: (name, hashlib.md5((base / name).read_bytes()).hexdigest())
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(tvd.Flowers102, "_file_dict", checked)
    monkeypatch.setattr(tvd.Flowers102, "classes", ["pink primrose", "orchid", "bell"], raising=False)
    source = load_source("flowers102", root=tmp_path, download=False)
    assert (source.kind, len(source.train), len(source.val)) == ("torchvision", 6, 6)  # train and val together
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.train.image(4).shape == (3, 16, 16)


def test_dtd(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for label, name in enumerate(("banded", "dotted")):
        write_class(base / "images" / name, label, 6)
    for split, numbers in (("train", range(2)), ("val", range(2, 4)), ("test", range(4, 6))):
        lines = [f"{c}/{label}_{n:03d}.png" for label, c in enumerate(("banded", "dotted")) for n in numbers]
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")
    source = load_source("dtd", root=tmp_path, download=False)
    assert (source.kind, len(source.train), len(source.val)) == ("torchvision", 8, 4)
    assert source.train.classes == ("banded", "dotted")


def test_food101(tmp_path: Path) -> None:
    base = tmp_path / "food-101"
    (base / "meta").mkdir(parents=True)
    for label, name in enumerate(("apple_pie", "waffles")):
        write_class(base / "images" / name, label, 6, suffix=".jpg")
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        listed = {c: [f"{c}/{i}_{n:03d}" for n in numbers] for i, c in enumerate(("apple_pie", "waffles"))}
        (base / "meta" / f"{split}.json").write_text(json.dumps(listed))
    source = load_source("food101", root=tmp_path, download=False)
    assert (source.kind, len(source.train), len(source.val)) == ("torchvision", 8, 4)
    assert source.val.image(3).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "folder", "classes"),
    [("eurosat", "eurosat/2750", 3), ("caltech256", "caltech256/256_ObjectCategories", 2)],
)
def test_one_split_is_divided(tmp_path: Path, name: str, folder: str, classes: int) -> None:
    for label, class_name in enumerate(("001.first", "002.second", "257.clutter")):
        write_class(tmp_path / folder / class_name, label, 5, suffix=".jpg")
    source = load_source(name, root=tmp_path, download=False)
    assert (source.kind, len(source.train.classes)) == ("torchvision", classes)  # Caltech's clutter is no class
    assert (len(source.train), len(source.val)) == (4 * classes, classes)
